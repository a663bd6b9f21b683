"""From items to token ids with an exact boundary between instruction part and response part.

An item is `[BOS] template(instruction) | response [EOS]`. The two parts are tokenized separately and joined, so that
the boundary never falls inside a token and a response has the same tokens whatever comes before it. The template's own
tokens count with the instruction, EOS with the response. The first token of a sequence is conditioned on BOS; where a
tokenizer has none, it is not scored (nothing predicts it).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from jpo_ray.errors import InputError

CHAT = "chat"
MARK = "\n"


@dataclass(frozen=True)
class Layout:
    """How texts become tokens: everything besides the tokenizer that decides the ids."""

    template: str  # with {instruction}, or `chat` for the tokenizer's own chat template
    response_prefix: str
    max_length: int  # tokens


@dataclass(frozen=True)
class TokenizedItems:
    """Token ids of n items, laid end to end.

    `ids[offsets[i]:offsets[i + 1]]` are item i's; its first `prompt_lengths[i]` are BOS and instruction part. `ids` is
    int32[total], `offsets` int64[n + 1], `prompt_lengths` int32[n]. The token at position 0 is never scored.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    prompt_lengths: npt.NDArray[np.int32]
    truncated: int  # items whose response was cut to max_length

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def instruction_tokens(self) -> npt.NDArray[np.int64]:
        """Scored tokens of the instruction part."""
        return self.prompt_lengths.astype(np.int64) - 1

    @property
    def response_tokens(self) -> npt.NDArray[np.int64]:
        return self.lengths - self.prompt_lengths

    @cached_property
    def prompt_groups(self) -> npt.NDArray[np.int64]:
        """For each item the first item with the same BOS and instruction part: int64[n]."""
        first: dict[bytes, int] = {}
        prompts = (self.item(row)[: self.prompt_lengths[row]].tobytes() for row in range(len(self)))
        return np.array([first.setdefault(prompt, row) for row, prompt in enumerate(prompts)], dtype=np.int64)

    def item(self, index: int) -> npt.NDArray[np.int32]:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def sequence_id(self, index: int) -> str:
        """Hash of what is scored: the ids and where the response begins."""
        start = int(self.prompt_lengths[index]).to_bytes(4, "little")
        return hashlib.sha256(start + self.item(index).tobytes()).hexdigest()[:24]


def prompt_texts(tokenizer: Any, layout: Layout, instructions: Sequence[str]) -> list[str]:
    """The text before the response, for each instruction: what a served or sampled model is given."""
    if layout.template == CHAT:
        _require_chat_template(tokenizer)
        return [
            tokenizer.apply_chat_template([_turn("user", text)], tokenize=False, add_generation_prompt=True)
            for text in instructions
        ]
    return [layout.template.replace("{instruction}", text) for text in instructions]


def prompt_ids(tokenizer: Any, layout: Layout, instructions: Sequence[str]) -> list[list[int]]:
    """BOS and instruction part of each instruction, untruncated."""
    return raw_ids(tokenizer, prompt_texts(tokenizer, layout, instructions))


def raw_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """BOS and the tokens of each text as it stands, without any layout."""
    ids = _encode(tokenizer, texts)
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    return [row if row[:1] == [bos] else [bos, *row] for row in ids]  # some chat templates write BOS themselves


def response_ids(
    tokenizer: Any, layout: Layout, responses: Sequence[str], ended: Sequence[bool] | None = None
) -> list[list[int]]:
    """Response part of each response, closed by EOS unless it has not `ended`, as one cut when it was drawn."""
    ended = [True] * len(responses) if ended is None else ended
    both = list(zip(responses, ended, strict=True))
    if layout.template == CHAT:
        _require_chat_template(tokenizer)
        ids = _encode_after(tokenizer, [_chat_suffix(tokenizer, text) if end else text for text, end in both])
    else:
        ids = _encode_after(tokenizer, [layout.response_prefix + text for text in responses])
    eos = tokenizer.eos_token_id
    return [row if row[-1:] == [eos] or not end else [*row, eos] for row, (_, end) in zip(ids, both, strict=True)]


def tokenize(
    tokenizer: Any,
    layout: Layout,
    instructions: Sequence[str],
    responses: Sequence[str],
    *,
    clip: bool = False,
    ended: Sequence[bool] | None = None,
) -> TokenizedItems:
    """Tokenize n items. Each distinct instruction is tokenized once. `ended` as in `response_ids`; default: all.

    A sequence longer than `layout.max_length` loses the end of its response (EOS included) and is counted. Raises
    `InputError` where not even one token of the response would be left, unless `clip`: then the instruction is cut too.
    """
    prompts = _prompts(tokenizer, layout, instructions)
    if not clip:
        _refuse_too_long(layout, prompts)
    rows: list[list[int]] = []
    prompt_lengths: list[int] = []
    truncated = 0
    for instruction, response in zip(instructions, response_ids(tokenizer, layout, responses, ended), strict=True):
        prompt = prompts[instruction][: layout.max_length - 1]
        truncated += len(prompt) + len(response) > layout.max_length
        rows.append((prompt + response)[: layout.max_length])
        prompt_lengths.append(len(prompt))
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    return TokenizedItems(
        ids=np.array([token for row in rows for token in row], dtype=np.int32),
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]),
        prompt_lengths=np.array(prompt_lengths, dtype=np.int32),
        truncated=truncated,
    )


def check_lengths(tokenizer: Any, layout: Layout, instructions: Sequence[str]) -> None:
    """Raise `InputError` where an instruction leaves no room for a response, as `tokenize` would later."""
    _refuse_too_long(layout, _prompts(tokenizer, layout, instructions))


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a tokenizer's behaviour: its vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = [tokenizer.bos_token, tokenizer.eos_token, str(getattr(tokenizer, "chat_template", None))]
    return hashlib.sha256(repr([rules, special]).encode()).hexdigest()[:16]


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
        "input_ids"
    ]
    return encoded


def _encode_after(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that follow another one.

    Tokenizers in the manner of SentencePiece (Llama's, Mistral's) put a space before whatever they are given. That of a
    text in the middle is kept away by a line break before it, which merges with nothing there.
    """
    (mark, alone, after) = _encode(tokenizer, [MARK, "a", MARK + "a"])
    if after == mark + alone:
        return _encode(tokenizer, texts)
    plain, marked = _encode(tokenizer, texts), _encode(tokenizer, [MARK + text for text in texts])
    both = zip(plain, marked, strict=True)
    return [ids[len(mark) :] if ids[: len(mark)] == mark else whole for whole, ids in both]


def _chat_suffix(tokenizer: Any, response: str) -> str:
    """What the chat template adds for an assistant's answer, up to and with its end-of-turn mark.

    It must not depend on the instruction, so it is read off a conversation with a placeholder.
    """
    user = _turn("user", "placeholder")
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user, _turn("assistant", response)], tokenize=False)
    if not whole.startswith(prompt):
        raise InputError(
            "model.template: the tokenizer's chat template writes an answer otherwise than its own generation prompt "
            "begins it; give the template as text with {instruction} instead"
        )
    suffix: str = whole[len(prompt) :]
    eos = tokenizer.eos_token
    if eos and eos in suffix:
        suffix = suffix[: suffix.rindex(eos) + len(eos)]  # line breaks after the end of the turn are never generated
    return suffix


def _require_chat_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "model.template: `chat`, but the tokenizer has no chat template; give a text with {instruction}"
        )


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _prompts(tokenizer: Any, layout: Layout, instructions: Sequence[str]) -> dict[str, list[int]]:
    """The instruction part of each distinct instruction."""
    distinct = list(dict.fromkeys(instructions))
    return dict(zip(distinct, prompt_ids(tokenizer, layout, distinct), strict=True))


def _refuse_too_long(layout: Layout, prompts: dict[str, list[int]]) -> None:
    worst = max(prompts, key=lambda instruction: len(prompts[instruction]), default=None)
    if worst is not None and len(prompts[worst]) >= layout.max_length:
        raise InputError(
            f"model.max_length={layout.max_length} is shorter than an instruction of {len(prompts[worst])} tokens "
            f"({worst[:60]!r}...); raise it to at least {len(prompts[worst]) + 2}, or drop such rows"
        )
