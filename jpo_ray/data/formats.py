"""Formats: what a raw row of named columns says, as one or two items and perhaps a verdict.

Texts are kept exactly as they stand. A conversation becomes one instruction and one response: the response is its last
assistant message, the instruction all before it (what follows is left out). A lone user message is taken as it is;
anything longer, or with a system message, is written out as blocks `role: content` with an empty line between, since an
item's instruction is one text. The string `\\n\\nHuman: ...\\n\\nAssistant: ...` (Anthropic HH) is such a conversation.
"""

import math
import re
from dataclasses import dataclass
from reprlib import repr as shorten
from typing import Any, Literal

from jpo_ray.config import Source
from jpo_ray.errors import InputError

Item = tuple[str, str]  # instruction, response
LabelVerdict = Literal["a", "b", "tie"]

# Columns that a format cannot do without; where several formats fit, a format of pairs is taken before the others.
REQUIRED: dict[str, tuple[str, ...]] = {
    "dove": ("i_chosen", "r_chosen", "i_reject", "r_reject"),
    "dove_raw": ("instruction_0", "response_0", "instruction_1", "response_1"),
    "dove_single": ("instruction", "response_0", "response_1"),
    "trl_preference": ("chosen", "rejected"),
    "ultrafeedback": ("instruction", "completions"),
    "summarize": ("info", "summaries", "choice"),
    "messages": ("messages",),
    "gold": ("instruction", "gold_response"),
    "sft": ("instruction", "response"),
}
_WITHOUT_PAIRS = ("messages", "gold", "sft")
# Columns of the two items' ratings, which a row may have or lack.
RATINGS = {
    "dove": ("score_chosen", "score_reject"),
    "dove_raw": ("score_0", "score_1"),
    "dove_single": ("score_0", "score_1"),
    "trl_preference": ("score_chosen", "score_rejected"),
}
ID_COLUMNS = ("id", "instruction_id", "row_id")
COLUMNS = {*ID_COLUMNS, "feedback", "prompt", "gold_response"}.union(*REQUIRED.values(), *RATINGS.values())
_FEEDBACK: dict[str, LabelVerdict] = {"0": "a", "1": "b", "2": "tie"}  # the better response by number, or equal
_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of data: the items it holds and what it says about them."""

    items: tuple[Item, ...]  # one, or two, or (ultrafeedback) any number of one instruction
    verdict: LabelVerdict | None  # of items[0] against items[1], where the data say
    gold: str | None  # gold response to items[0]'s instruction
    where: str  # "file.jsonl line 12" or "file.parquet row 12", for errors
    kind: str  # its format
    ratings: tuple[float | None, ...] = ()  # of the items, where the data rate them
    single_turn: bool = True  # whether no instruction holds earlier turns of its conversation


class BadRow(InputError):
    """A row that cannot be used; skipped rows are counted by `reason`. `plain` is the message without the mend."""

    def __init__(self, where: str, reason: str, detail: str = "", others: int = 0) -> None:
        more = f" ({others:,} more {'rows' if others > 1 else 'row'} cannot be used)" if others else ""
        self.plain = f"{where}: {detail or reason}{more}"
        super().__init__(f"{self.plain}; mend it or set items.on_bad_rows: skip")
        self.where, self.reason, self.detail = where, reason, detail


def format_of(values: dict[str, Any], source: Source, where: str) -> str:
    """The format that the columns fit; `BadRow` where none does, or several that mean different things."""
    missing = {kind: [name for name in names if name not in values] for kind, names in REQUIRED.items()}
    found = f"columns found: {', '.join(map(str, values)) or 'none'}"
    if source.format != "auto":
        for name in missing[source.format]:
            raise BadRow(where, f"missing `{name}`", f"`{name}` is missing, format {source.format} needs it; {found}")
        return source.format
    fitting = [kind for kind in REQUIRED if not missing[kind]]
    if not fitting:
        known = "; ".join(f"{kind} ({', '.join(names)})" for kind, names in REQUIRED.items())
        raise BadRow(where, "unknown columns", f"{found}; formats known: {known}; rename with the source's `columns`")
    if fitting[0] in _WITHOUT_PAIRS and len(fitting) > 1:
        raise BadRow(
            where, "ambiguous columns", f"{found}; they fit {' and '.join(fitting)}: set the source's `format`"
        )
    return fitting[0]


def row_of(values: dict[str, Any], kind: str, where: str) -> Row:
    """The row in a known format. Raises `BadRow`."""
    verdict: LabelVerdict | None = "a" if kind in ("dove", "trl_preference") else None
    gold: str | None = None
    items: tuple[Item, ...]
    single_turn = True
    if kind == "trl_preference":
        sides = {side: _trl_messages(values, side, where) for side in ("chosen", "rejected")}
        items = tuple(_item(messages, side, where) for side, messages in sides.items())
        single_turn = all(map(_is_single_turn, sides.values()))
    elif kind == "ultrafeedback":
        return _ultrafeedback_row(values, where)
    elif kind == "summarize":
        return _summarize_row(values, where)
    elif kind == "messages":
        messages = _messages(values, "messages", where)
        items, single_turn = (_item(messages, "messages", where),), _is_single_turn(messages)
    elif kind == "dove_single":
        instruction, *responses = [_text(values, name, where) for name in REQUIRED[kind]]
        items = ((instruction, responses[0]), (instruction, responses[1]))
        gold = None if values.get("gold_response") is None else _text(values, "gold_response", where)
    else:  # the columns come as instruction, response, instruction, response
        texts = [_text(values, name, where) for name in REQUIRED[kind]]
        items = tuple(zip(texts[::2], texts[1::2], strict=True))
    if kind in ("dove_raw", "dove_single"):
        verdict = _feedback(values.get("feedback"), where)
    elif kind == "gold":
        gold = items[0][1]
    ratings = tuple(_rating(values.get(name), name, where) for name in RATINGS.get(kind, ()))
    rated = ratings if any(rating is not None for rating in ratings) else ()
    return Row(items, verdict, gold, where, kind, rated, single_turn)


def _ultrafeedback_row(values: dict[str, Any], where: str) -> Row:
    """UltraFeedback's own form: completions of one instruction, each with a `response` and an `overall_score`."""
    completions = values["completions"]
    if not isinstance(completions, list) or not completions or not all(isinstance(each, dict) for each in completions):
        raise BadRow(where, "bad `completions`", f"`completions` is {shorten(completions)}, not a list of objects")
    instruction = _text(values, "instruction", where)
    items = tuple((instruction, _text(each, "response", where)) for each in completions)
    ratings = tuple(_rating(each.get("overall_score"), "overall_score", where) for each in completions)
    return Row(items, None, None, where, "ultrafeedback", ratings)


def _summarize_row(values: dict[str, Any], where: str) -> Row:
    """OpenAI's `summarize_from_feedback`, `comparisons`: two summaries of a post, and which of them (0, 1) was chosen.

    The summaries begin with a space, which is left out. Rows about an article have no post.
    """
    info, summaries, choice = (values[name] for name in REQUIRED["summarize"])
    if not isinstance(info, dict):
        raise BadRow(where, "bad `info`", f"`info` is {shorten(info)}, not an object")
    if not info.get("post"):
        raise BadRow(where, "no `info.post`", "`info.post` is empty, as in rows about an article")
    two = isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(each, dict) for each in summaries)
    if not two:
        raise BadRow(where, "bad `summaries`", f"`summaries` is {shorten(summaries)}, not a list of two objects")
    if isinstance(choice, bool) or choice not in (0, 1):
        raise BadRow(where, "bad `choice`", f"`choice` is {shorten(choice)}, not 0 or 1")
    post = _text(info, "post", where)
    items = tuple((post, _text(each, "text", where).strip()) for each in summaries)
    return Row(items, "b" if choice else "a", None, where, "summarize")


def _rating(value: Any, name: str, where: str) -> float | None:
    """A number, also as text; None where there is none."""
    if value is None or value == "":
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not isinstance(value, float) and not math.isfinite(found):
        raise BadRow(where, f"bad `{name}`", f"`{name}` is {shorten(value)}, not a number")
    return found if math.isfinite(found) else None  # NaN is what pandas writes for an absent number


def _feedback(value: Any, where: str) -> LabelVerdict | None:
    if value is None or value != value:  # NaN is what pandas writes for an absent number
        return None
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    verdict = None if isinstance(number, bool) else _FEEDBACK.get(str(number))
    if verdict is None:
        detail = f"`feedback` is {shorten(value)}, not 0 (first better), 1 (second better) or 2 (equal)"
        raise BadRow(where, "bad `feedback`", detail)
    return verdict


def _trl_messages(values: dict[str, Any], side: str, where: str) -> list[Item]:
    """(role, content) of one side; the instruction is `prompt` unless the side is a whole conversation."""
    prompt, answer = values.get("prompt"), values.get(side)
    if isinstance(answer, list):
        messages = _messages(values, side, where)
    elif prompt is None:
        messages = _hh_messages(_text(values, side, where))
    else:
        messages = [("assistant", _text(values, side, where))]
    if isinstance(prompt, list):
        messages = [*_messages(values, "prompt", where), *messages]
    elif prompt is not None and len(messages) == 1:  # else the prompt only repeats its start, as in UltraFeedback
        messages = [("user", _text(values, "prompt", where)), *messages]
    return messages


def _hh_messages(text: str) -> list[Item]:
    before, *turns = _HH_TURN.split(text)
    messages = [("user", before)] if before.strip() else []
    roles = ["user" if name == "Human" else "assistant" for name in turns[::2]]
    return messages + list(zip(roles, turns[1::2], strict=True))


def _messages(values: dict[str, Any], name: str, where: str) -> list[Item]:
    """(role, content) of each message in a column."""
    given = values.get(name)
    if not isinstance(given, list):
        raise BadRow(where, f"bad `{name}`", f"`{name}` is {shorten(given)}, not a list of messages")
    for message in given:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
            raise BadRow(where, f"bad `{name}`", f"`{name}` holds {shorten(message)}, not {{role, content}}")
    return [(message["role"], _string(message["content"], f"{name}.content", where)) for message in given]


def _item(messages: list[Item], name: str, where: str) -> Item:
    """Instruction and response of a conversation."""
    messages = _spoken(messages)
    last = max((index for index, (role, _) in enumerate(messages) if role == "assistant"), default=0)
    if last == 0:
        raise BadRow(where, f"bad `{name}`", f"`{name}` has no assistant message that answers another one")
    before, response = messages[:last], messages[last][1]
    both = {f"{name} instruction": instruction_of(before), f"{name} response": response}
    return _text(both, f"{name} instruction", where), _text(both, f"{name} response", where)


def instruction_of(messages: list[Item]) -> str:
    """The instruction that a conversation of (role, content) is, up to the answer that is wanted."""
    spoken = _spoken(messages)
    lone = len(spoken) == 1 and spoken[0][0] == "user"
    return spoken[0][1] if lone else "\n\n".join(f"{role}: {content}" for role, content in spoken)


def _spoken(messages: list[Item]) -> list[Item]:
    return [(role, content) for role, content in messages if role != "system" or content.strip()]


def _is_single_turn(messages: list[Item]) -> bool:
    """Whether the assistant speaks once."""
    return sum(role == "assistant" for role, _ in messages) == 1


def _text(values: dict[str, Any], name: str, where: str) -> str:
    if name not in values:
        raise BadRow(where, f"missing `{name}`")
    text = _string(values[name], name, where)
    if not text.strip():
        raise BadRow(where, f"empty `{name}`")
    return text


def _string(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(where, f"`{name}` is not text", f"`{name}` is {shorten(value)}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell and no file can store
            raise BadRow(where, f"`{name}` is not Unicode") from error
    return value
