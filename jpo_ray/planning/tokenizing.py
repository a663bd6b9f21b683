"""Counting tokens with a tokenizer's own file, without transformers (which would load torch)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jpo_ray.files import read_json

CHARACTERS_PER_TOKEN = 4.0  # of English, where there is no tokenizer


class PlainTokenizer:
    """What `data.tokens.tokenize` asks of a tokenizer, for templates that are texts."""

    chat_template = None

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        self.bos_token_id, self.eos_token_id = (self._id(settings.get(f"{name}_token")) for name in ("bos", "eos"))

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return {"input_ids": [one.ids for one in encoded]}

    def _id(self, token: Any) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        return self._backend.token_to_id(text) if text else None


def plain_tokenizer(folder: Path | None) -> PlainTokenizer | None:
    """The tokenizer in a model's folder, or None where it has no `tokenizer.json`."""
    return PlainTokenizer(folder) if folder is not None and (folder / "tokenizer.json").exists() else None
