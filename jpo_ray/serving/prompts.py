"""From a request to the token ids that the engine is given: those of training."""

from collections.abc import Mapping
from typing import Any

from jpo_ray.data.tokens import Layout, prompt_ids, raw_ids, response_ids
from jpo_ray.serving.bodies import BodyError, ChatBody, CompletionBody, Item


class Prompts:
    """Lays requests out as the served models learned it."""

    def __init__(self, tokenizer: Any, layout: Layout, max_model_len: int, vocabulary: int) -> None:
        self._tokenizer, self._layout, self._max_model_len = tokenizer, layout, max_model_len
        self._vocabulary = min(vocabulary, len(tokenizer))  # tokens that may be added are not always embedded
        self._longest_token = max(map(len, tokenizer.get_vocab()))
        self._most_characters = max_model_len * self._longest_token

    def of_chat(self, body: ChatBody) -> list[int]:
        """Ids of a conversation under the training template. Raises `BodyError` where it is too long."""
        instruction = body.instruction()
        self._require_short(instruction, "messages")
        ids = prompt_ids(self._tokenizer, self._layout, [instruction])[0]
        self._require_taken(ids, "messages")
        return ids

    def of_completion(self, body: CompletionBody) -> list[list[int]]:
        """Ids of each prompt as it stands, after BOS. Raises `BodyError` where one is too long or no token."""
        prompts = body.prompts()
        for prompt in prompts:
            self._require_short(prompt, "prompt")
        ids = [raw_ids(self._tokenizer, [prompt])[0] if isinstance(prompt, str) else prompt for prompt in prompts]
        for row in ids:
            self._require_taken(row, "prompt")
        return ids

    def require_scorable(self, items: Mapping[str, Item]) -> None:
        """Raise `BodyError` where an item, by its field, is longer than any of training: a part would be scored."""
        most = self._layout.max_length
        takes = f"and scores are of at most {most} tokens of instruction and response together"
        for field, item in items.items():
            characters = max(len(item.instruction), len(item.response))
            if characters > most * self._longest_token:
                raise BodyError(f"{field}: {characters} characters, {takes}", field)
        instructions = [item.instruction for item in items.values()]
        prompts = prompt_ids(self._tokenizer, self._layout, instructions)
        responses = response_ids(self._tokenizer, self._layout, [item.response for item in items.values()])
        for field, prompt, response in zip(items, prompts, responses, strict=True):
            if (length := len(prompt) + len(response)) > most:
                raise BodyError(f"{field}: {length} tokens, {takes}", field)
            self._require_embedded([*prompt, *response], field)

    def room(self, prompts: list[list[int]], asked: int, *, wanted: bool) -> int:
        """Tokens of answer to give: those asked for. Raises `BodyError` where they are `wanted` and do not fit."""
        left = self._max_model_len - max(map(len, prompts))
        if wanted and asked > left:
            raise BodyError(f"max_tokens: {asked}, and after this prompt the model takes {left}", "max_tokens")
        return min(asked, left)

    def _require_short(self, prompt: str | list[int], field: str) -> None:
        """Raise `BodyError` for what is too long whatever its tokens are: tokenizing a megabyte takes a second."""
        most = self._most_characters if isinstance(prompt, str) else self._max_model_len
        if len(prompt) > most:
            unit = "characters" if isinstance(prompt, str) else "tokens"
            takes = f"the model takes fewer than {self._max_model_len} tokens"
            raise BodyError(f"{field}: {len(prompt)} {unit}, and {takes}", field)

    def _require_taken(self, ids: list[int], field: str) -> None:
        self._require_embedded(ids, field)
        if len(ids) >= self._max_model_len:
            raise BodyError(f"{field}: {len(ids)} tokens, and the model takes fewer than {self._max_model_len}", field)

    def _require_embedded(self, ids: list[int], field: str) -> None:
        if max(ids, default=0) >= self._vocabulary:
            raise BodyError(f"{field}: token {max(ids)}, and the vocabulary has {self._vocabulary}", field)
