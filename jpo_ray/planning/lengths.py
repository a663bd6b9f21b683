"""How long items are: tokens as the model sees them, characters as a judge is shown them."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray.config import RunConfig
from jpo_ray.data.tokens import CHAT, Layout, tokenize
from jpo_ray.planning.tokenizing import CHARACTERS_PER_TOKEN, PlainTokenizer

COUNTED, STATED, UNKNOWN = "counted", "stated in plan", "not known"
TOKENIZED_AT_MOST = 20_000  # items; of more, so many stand for all

Number = int | float | None


@dataclass(frozen=True)
class Tokens:
    """None: not known."""

    origin: str
    instruction: Number = None  # of an item in the mean, BOS and template included
    response: Number = None  # EOS included
    compared: Number = None  # of an item that may be compared, in the mean
    fine_tuning: int | None = None  # of one epoch of SFT
    instruction_characters: Number = None
    response_characters: Number = None


def product(*values: Number) -> float | None:
    """None where one factor is not known."""
    found = 1.0
    for value in values:
        if value is None:
            return None
        found *= value
    return found


def whole(value: Number) -> int | None:
    return None if value is None else round(value)


def count_tokens(
    config: RunConfig,
    items: pa.Table | None,
    short: pa.Table | None,
    counted: set[str],
    tokenizer: PlainTokenizer | None,
    fine_tuning: int | None,
) -> Tokens:
    """`items` hold the splits `counted`, `short` those of them that may be compared; `fine_tuning` is their number."""
    if items is None or short is None or "train" not in counted or "train" not in items["split"].to_pylist():
        return _stated(config, fine_tuning)
    here = items.filter(pc.not_equal(items["split"], "sft"))
    instruction, response, how = _means(config, here, tokenizer)
    each = instruction + response
    if 0 < len(short) < len(items):
        each = sum(_means(config, short.filter(pc.not_equal(short["split"], "sft")), tokenizer)[:2])
    if not config.items.sft:
        chosen = pc.and_(pc.equal(here["split"], "train"), here["sft"])
        tuned: Number = sum(_means(config, here.filter(chosen), tokenizer)[:2])
    elif "sft" in counted and fine_tuning:
        tuned = sum(_means(config, items.filter(pc.equal(items["split"], "sft")), tokenizer)[:2])
    else:
        tuned = config.plan.sft_tokens
    return Tokens(
        how,
        instruction,
        response,
        each,
        whole(product(fine_tuning, tuned)),
        *(float(pc.mean(pc.utf8_length(here[name])).as_py()) for name in ("instruction", "response")),
    )


def _stated(config: RunConfig, fine_tuning: int | None) -> Tokens:
    plan = config.plan
    if plan.instruction_tokens is None or plan.response_tokens is None:
        return Tokens(UNKNOWN, fine_tuning=whole(product(fine_tuning, plan.sft_tokens)))
    each = plan.instruction_tokens + plan.response_tokens
    return Tokens(
        STATED,
        plan.instruction_tokens,
        plan.response_tokens,
        each,
        whole(product(fine_tuning, plan.sft_tokens if config.items.sft else each)),
        plan.instruction_tokens * CHARACTERS_PER_TOKEN,
        plan.response_tokens * CHARACTERS_PER_TOKEN,
    )


def _means(config: RunConfig, items: pa.Table, tokenizer: PlainTokenizer | None) -> tuple[float, float, str]:
    """Mean tokens of the instruction and the response part, of all items or of some that stand for them; and how."""
    model = config.model
    template = "{instruction}" if model.template == CHAT else model.template
    if tokenizer is None:
        prompts, responses = (pc.mean(pc.utf8_length(items[name])).as_py() for name in ("instruction", "response"))
        prompts += len(template.replace("{instruction}", ""))
        bos = eos = 1
        return prompts / CHARACTERS_PER_TOKEN + bos, responses / CHARACTERS_PER_TOKEN + eos, "four characters a token"
    some = items
    if len(items) > TOKENIZED_AT_MOST:
        some = items.take(np.random.default_rng(0).permutation(len(items))[:TOKENIZED_AT_MOST])
    # A chat template needs the whole of transformers: its own tokens, some ten an item, are left out here.
    layout = Layout(template, model.response_prefix, model.max_length)
    tokens = tokenize(tokenizer, layout, some["instruction"].to_pylist(), some["response"].to_pylist(), clip=True)
    how = "tokenized" if len(some) == len(items) else f"tokenized, {len(some):,} of {len(items):,} items"
    return float(tokens.prompt_lengths.mean()), float(tokens.response_tokens.mean()), how
