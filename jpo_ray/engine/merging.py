"""Adapters merged into their base: a model that needs neither peft nor its base any more."""

from pathlib import Path
from typing import Any

from torch import nn

from jpo_ray.engine.adapters import BASE_RECORD, CONFIG, load_adapter
from jpo_ray.engine.model import DTYPES, load_tokenizer, model_folder
from jpo_ray.files import read_json


def adapter_named(name_or_path: str, key: str) -> Path | None:
    """Folder of the adapter that a model's name stands for; None where it stands for a model. Raises `InputError`."""
    folder = model_folder(name_or_path, key)
    return folder if (folder / CONFIG).exists() and not (folder / "config.json").exists() else None


def merge_adapter(adapter: Path, base: Path, out: Path, dtype: str) -> dict[str, Any]:
    """Write `base` with `adapter` added to its weights into `out`: safetensors, tokenizer, generation config.

    The sum is formed in float32, of unquantised weights, and rounded to `dtype` once. Returns facts for people. The
    caller has checked that the adapter belongs on `base`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    adapted = load_adapter(adapter, base, dtype="float32")
    _untie(adapted)
    model = adapted.merge_and_unload(safe_merge=True)
    model.to(DTYPES[dtype]).save_pretrained(out)
    tokenizer_of(adapter, base).save_pretrained(out)
    facts: dict[str, Any] = {"adapter": str(adapter), "merged into": str(base), "dtype": dtype}
    if trained_on_4bit(adapter):
        facts["note"] = "trained on 4-bit weights, merged into the unquantised ones: answers differ a little"
    return facts


def _untie(adapted: Any) -> None:
    """Part a head from the embedding whose weights it has, where an update of one of them must not reach the other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = adapted.get_base_model()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    updated = isinstance(head, BaseTunerLayer) or isinstance(embedding, BaseTunerLayer)
    if not updated or head.weight is not embedding.weight:
        return
    getattr(head, "base_layer", head).weight = nn.Parameter(head.weight.detach().clone())
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def trained_on_4bit(adapter: Path) -> bool:
    record = adapter / BASE_RECORD
    return record.exists() and bool(read_json(record).get("load_in_4bit"))


def tokenizer_of(adapter: Path, base: Path) -> Any:
    """The tokenizer beside the adapter, which may have a chat template of its own; else the base's."""
    own = (adapter / "tokenizer_config.json").exists() or (adapter / "tokenizer.json").exists()
    return load_tokenizer(adapter if own else base)
