"""Instructions beside the model's limit: whether they fit, and which of them are too long."""

from typing import Any

import pyarrow as pa

from jpo_ray import records
from jpo_ray.config import TINY
from jpo_ray.data.tokens import check_lengths, prompt_ids
from jpo_ray.pipeline.base_model import MODEL_KEY, adapter_to_start_from, base_model, item_texts
from jpo_ray.pipeline.context import Context


def check_instructions_fit(context: Context) -> None:
    """Raise `InputError` for an instruction longer than `max_length` now, before pairs and judging are paid for."""
    from jpo_ray.engine.jobs import layout_of

    items = records.read_table(context.path("items") / "items.parquet", records.ITEMS)
    check_lengths(_tokenizer(context, items), layout_of(context.config.model), items["instruction"].to_pylist())


def long_instructions(context: Context, items: pa.Table, limit: int) -> set[str]:
    """Ids of the instructions that have more than `limit` tokens, template and BOS included."""
    from jpo_ray.engine.jobs import layout_of

    texts = dict(zip(items["instruction_id"].to_pylist(), items["instruction"].to_pylist(), strict=True))
    prompts = prompt_ids(_tokenizer(context, items), layout_of(context.config.model), list(texts.values()))
    return {identity for identity, prompt in zip(texts, prompts, strict=True) if len(prompt) > limit}


def _tokenizer(context: Context, items: pa.Table) -> Any:
    """The base model's, before there is one where it is made from the run's own text."""
    from jpo_ray.engine.adapters import base_of
    from jpo_ray.engine.merging import tokenizer_of
    from jpo_ray.engine.model import load_tokenizer
    from jpo_ray.sandbox.model import TINY_VOCABULARY, make_tokenizer

    if context.config.model.model_name_or_path == TINY:  # as the `sft` stage will make it
        return make_tokenizer(item_texts(items), TINY_VOCABULARY)
    if adapter := adapter_to_start_from(context):
        return tokenizer_of(adapter, base_of(adapter, MODEL_KEY))
    return load_tokenizer(base_model(context)[0])
