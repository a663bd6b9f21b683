"""The sample stage: responses of every model to the instructions of a split."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jpo_ray import records
from jpo_ray.cache import cache_folder
from jpo_ray.config import SampleConfig
from jpo_ray.errors import InputError
from jpo_ray.evaluation.generation import SampledModel
from jpo_ray.pipeline.console import progress_bar
from jpo_ray.pipeline.context import Context, Spec
from jpo_ray.pipeline.model_stages import sft_model

ANSWERED = "answered.jsonl"  # what an interrupted build has already
FAILURES_SHOWN = 20


def sample_specs(context: Context) -> list[Spec]:
    config = context.config.sample
    if config is None:
        return []
    from jpo_ray.cluster.sampling import choose_engine

    engine = choose_engine(config.engine)
    names = _models(context, config)
    inputs = {"items": context.standing("items", "items").fingerprint, "sft": sft_model(context)[1]}
    inputs |= {name: context.standing(f"train/{name}", "train").fingerprint for name in names if name != "sft"}
    slice_ = {
        "sample": config.model_dump(exclude={"timeout_s", "engine", "models", "tensor_parallel_size"}),
        "models": names,
        "engine": engine,
        "model": context.config.model.model_dump(exclude={"model_name_or_path", "load_in_4bit"}),
        "seed": context.seed(config.seed),
    }
    return [
        Spec(
            "sample", "sample", inputs, slice_, lambda out: _sample(context, config, engine, names, out),
            keep_partial=True,
        )
    ]  # fmt: skip


def _models(context: Context, config: SampleConfig) -> list[str]:
    return config.models or ["sft", *(entry.name for entry in context.config.trained)]


def _sample(context: Context, config: SampleConfig, engine: str, names: list[str], out: Path) -> dict[str, Any]:
    instructions, left_out = _instructions(context, config)
    base = sft_model(context)[0].resolve()
    models = [sampled_model(context, name, base) for name in names]
    rows = draw(context, config, engine, instructions, models, context.seed(config.seed), out)
    records.write_table(out / "samples.parquet", rows, records.SAMPLES)
    return {
        "samples": len(rows),
        "instructions": len(instructions),
        **left_out,
        "engine": engine,
        "cut at max_new_tokens": sum(row["finish_reason"] == "length" for row in rows),
        "empty responses": sum(not row["response"].strip() for row in rows),
    }


def draw(
    context: Context,
    config: SampleConfig,
    engine: str,
    instructions: Mapping[str, str],
    models: Sequence[SampledModel],
    seed: int,
    out: Path,
) -> list[dict[str, Any]]:
    """Rows of `records.SAMPLES`: what the models say to `instructions` (id -> text), at every temperature.

    Answers are kept in `out` as they come, so that an interrupted build goes on from them. Raises `RuntimeError` where
    requests failed.
    """
    from jpo_ray.cluster.sampling import generate
    from jpo_ray.data.tokens import prompt_ids
    from jpo_ray.engine.jobs import layout_of
    from jpo_ray.engine.model import load_tokenizer
    from jpo_ray.evaluation.generation import Request, clean_response, effective_temperature

    if engine == "transformers" and config.engine == "auto":
        context.console.print("  vllm is not installed: sampling with transformers, which is slower", highlight=False)
    base = models[0].base
    prompts = prompt_ids(load_tokenizer(base), layout_of(context.config.model), list(instructions.values()))
    _require_room(base, max(map(len, prompts)), config.max_new_tokens)
    wanted = [
        (identity, text, ids, model, temperature, index)
        for model in models
        for temperature in config.temperatures
        for index in range(config.samples_per_instruction)
        for (identity, text), ids in zip(instructions.items(), prompts, strict=True)
    ]
    requests = [
        Request(number, model, ids, temperature, _request_seed(seed, identity, temperature, index))
        for number, (identity, _, ids, model, temperature, index) in enumerate(wanted)
    ]
    rows = {row["number"]: row for row in _answered(out / ANSWERED)}
    missing = [request for request in requests if request.number not in rows]
    with (
        progress_bar(context.console, f"sampling {len(models)} models with {engine}") as bar,
        (out / ANSWERED).open("a", encoding="utf-8") as answered,
    ):
        bar.begin(len(requests))
        bar.advance(len(rows))
        if not missing:
            answers: Iterator[Any] = iter(())
        else:
            answers = generate(
                context.ray(), context.cluster("sample"), config, engine, context.config.model.dtype, missing
            )
        failed = 0
        for answer in answers:
            if answer.error:
                failed += 1
                _report_failure(context, requests[answer.number], wanted[answer.number][1], answer.error, failed)
                continue
            identity, text, _, model, temperature, _ = wanted[answer.number]
            rows[answer.number] = {
                "instruction_id": identity,
                "instruction": text,
                "model": model.name,
                "temperature": temperature,
                "effective_temperature": effective_temperature(engine, temperature),
                "seed": requests[answer.number].seed,
                "response": clean_response(answer.text, context.config.model.response_prefix),
                "finish_reason": "stop" if answer.ended else "length",
                "engine": engine,
                "number": answer.number,
            }
            answered.write(json.dumps(rows[answer.number]) + "\n")
            answered.flush()
            bar.advance(1)
    if failed:
        raise RuntimeError(
            f"sample: {failed:,} of {len(requests):,} requests failed (see above); the other responses are kept, and "
            "the same command asks for the missing ones again"
        )
    if len(rows) != len(requests):
        raise RuntimeError(f"sample: {len(requests)} responses asked for, {len(rows)} came")
    (out / ANSWERED).unlink()
    return [{key: rows[number][key] for key in records.SAMPLES.names} for number in range(len(requests))]


def _report_failure(context: Context, request: Any, instruction: str, error: str, count: int) -> None:
    """A line for each of the first failures."""
    if count <= FAILURES_SHOWN:
        reason = " ".join(error.split())[:200]
        context.console.print(
            f"  no response of {request.model.name} at temperature {request.temperature:g} to {instruction[:60]!r}: "
            f"{reason}", highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    elif count == FAILURES_SHOWN + 1:
        context.console.print("  further failures are counted only", highlight=False)


def sampled_model(context: Context, name: str, base: Path) -> SampledModel:
    """Raises `InputError` for an adapter that is not of `base`, the SFT model's folder."""
    from jpo_ray.engine.adapters import CONFIG, check_base

    folder = base if name == "sft" else context.path(f"train/{name}").resolve()
    if not (folder / CONFIG).exists():
        return SampledModel(name, folder, folder)
    check_base(folder, base, f"sample: {name}", cache_folder())
    return SampledModel(name, folder, base)


def _instructions(context: Context, config: SampleConfig) -> tuple[dict[str, str], dict[str, int]]:
    """Instructions of the split, the first `max_instructions` in data order, id -> text; and how many are left out.

    Those without a gold response are where others have one.
    """
    items = records.read_table(context.path("items") / "items.parquet", records.ITEMS).to_pylist()
    here = [item for item in items if item["split"] == config.split]
    with_gold = [item for item in here if item["gold"]]
    found = {item["instruction_id"]: item["instruction"] for item in with_gold or here}
    if not found:
        raise InputError(f"sample: no instructions in the {config.split} split; give items.{config.split}")
    taken = dict(list(found.items())[: config.max_instructions])
    left_out = {"left out without gold": len({item["instruction_id"] for item in here} - found.keys())}
    if len(taken) < len(found):
        left_out["left out beyond max_instructions"] = len(found) - len(taken)
    return taken, left_out


def _require_room(model: Path, longest: int, max_new_tokens: int) -> None:
    """vLLM does not start for sequences longer than the model takes, and Ray Data would try for ever."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    stretched = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default"
    if limit and not stretched and longest + max_new_tokens > limit:
        raise InputError(
            f"sample.max_new_tokens={max_new_tokens}: the model takes {limit} tokens and the longest prompt has "
            f"{longest}; set it to {limit - longest} or less, or leave such instructions out"
        )


def _answered(path: Path) -> list[dict[str, Any]]:
    """Rows that an interrupted build left; a last line that was cut short is cut off."""
    if not path.exists():
        return []
    written = path.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def _request_seed(seed: int, identity: str, temperature: float, index: int) -> int:
    """The same for all models, so that they are compared under the same random numbers."""
    key = [seed, identity, temperature, *([index] if index else [])]
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1
