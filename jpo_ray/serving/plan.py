"""What is deployed: from a config and the models it names to the engines, all checked before anything starts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jpo_ray.cluster.sampling import VLLM_BATCH_TOKENS, VLLM_CPU_ENV, VLLM_LORA_RANKS, require_vllm
from jpo_ray.config_serve import ScoringConfig, ServeConfig
from jpo_ray.data.tokens import Layout
from jpo_ray.errors import InputError
from jpo_ray.runs import run_root
from jpo_ray.serving.adapter_checks import AdapterError, base_shapes
from jpo_ray.serving.adapters import AdapterStore, Listed, own_folder
from jpo_ray.serving.models import BASE, Adapter, Offer, find_models
from jpo_ray.store import location

LONGEST_DEFAULT = 4096  # tokens, where neither config nor model says less


@dataclass(frozen=True)
class EnginePlan:
    """One base model and its engine."""

    name: str
    folder: str
    beta: float | None  # of a whole model that preferences trained
    takes_adapters: bool


@dataclass(frozen=True)
class Plan:
    """Everything that replicas need to know. The first engine is the front: it has the HTTP routes."""

    engines: list[EnginePlan]
    base: str  # folder of the SFT model: the reference of all others
    layout: Layout
    dtype: str
    max_model_len: int
    vocabulary: int  # tokens that every model embeds
    max_adapters: int
    max_rank: int
    state_dir: str  # below which every server has a folder of its own; that folder once it has `begun`
    adapter_folders: list[str]
    adapters: list[Listed]  # where they lie; the server's copies once it has `begun`
    keys_required: bool
    warnings: list[str]

    def store(self, beta: float) -> AdapterStore:
        shapes = base_shapes(Path(self.base))
        return AdapterStore(
            Path(self.state_dir), shapes, max_adapters=self.max_adapters, max_rank=self.max_rank, beta=beta
        )


def make_plan(config: ServeConfig, *, keys_required: bool) -> Plan:
    """Find and check all models; nothing is written yet. Raises `InputError`."""
    require_vllm("serve")
    offer = find_models(config)
    engines = [EnginePlan(BASE, str(offer.base), None, takes_adapters=True)]
    beta = config.scoring.beta if config.scoring else 0.1
    for entry in offer.full:
        engines.append(EnginePlan(entry.name, str(entry.folder.resolve()), entry.beta or beta, takes_adapters=False))
    texts = _text_configs(offer)
    run_folder = run_root(location(config.run_dir or "."))
    state = Path(config.state_dir or run_folder / "serving").expanduser().resolve()
    shapes = base_shapes(offer.base)
    store = AdapterStore(state, shapes, max_adapters=config.max_adapters, max_rank=VLLM_LORA_RANKS[-1], beta=beta)
    try:
        adapters = store.checked(offer.adapters)
    except (AdapterError, OSError) as error:
        raise InputError(f"adapters: {error}") from error
    run_folders = [str((run_folder / "train").resolve())] if config.run_dir else []
    return Plan(
        engines=engines,
        base=str(offer.base),
        layout=offer.layout,
        dtype=offer.dtype,
        max_model_len=_max_model_len(config, texts),
        vocabulary=min(text.vocab_size for text in texts),
        max_adapters=config.max_adapters,
        max_rank=_rank([config.max_lora_rank, *(entry.rank for entry in adapters)]),
        state_dir=str(state),
        adapter_folders=[*run_folders, *(str(Path(f).expanduser().resolve()) for f in config.adapter_folders)],
        adapters=adapters,
        keys_required=keys_required,
        warnings=offer.warnings,
    )


@contextmanager
def server_folder(plan: Plan) -> Iterator[Path]:
    """A folder for this server's adapters, which no other one reads or writes. Raises `InputError`."""
    with ExitStack() as stack:
        with _written(plan.state_dir):
            folder = stack.enter_context(own_folder(Path(plan.state_dir)))
        yield folder


def begun(plan: Plan, folder: Path) -> Plan:
    """The plan with its adapters copied into `folder`, where their list begins with them. Raises `InputError`."""
    plan = replace(plan, state_dir=str(folder))
    adapters = [Adapter(entry.name, Path(entry.source), entry.beta) for entry in plan.adapters]
    try:
        with _written(plan.state_dir):
            listed = plan.store(ScoringConfig().beta).begin(adapters)
    except AdapterError as error:
        raise InputError(f"adapters: {error}") from error
    return replace(plan, adapters=list(listed.values()))


@contextmanager
def _written(state: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"state_dir {state}: cannot be written ({error.strerror}); set state_dir") from error


def engine_options(plan: Plan, config: ServeConfig, engine: EnginePlan) -> dict[str, Any]:
    """vLLM's arguments for an engine."""
    gpu = config.gpus_per_replica > 0
    options: dict[str, Any] = {
        "dtype": plan.dtype,
        "tokenizer": plan.base,  # of all models; a merged one may have come without
        "max_model_len": plan.max_model_len,
        "enforce_eager": not gpu,
        "tensor_parallel_size": config.tensor_parallel_size,
    }
    if config.max_num_seqs is not None:
        options["max_num_seqs"] = config.max_num_seqs
    if not gpu:  # prompts prefilled in pieces would end a CPU engine that draws with seeds
        batch = max(VLLM_BATCH_TOKENS, plan.max_model_len)
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": batch}
    if engine.takes_adapters:
        slots = plan.max_adapters + 1  # one stays empty: see loaded.py
        options |= {"enable_lora": True, "max_loras": slots, "max_cpu_loras": slots, "max_lora_rank": plan.max_rank}
    return options


def engine_environment(config: ServeConfig, cores: int) -> dict[str, str]:
    """Environment of an engine's processes."""
    # vLLM's own set-up of logging closes the handlers that stand, Serve's among them: its logs would end there.
    environment = {"VLLM_CONFIGURE_LOGGING": "0"}
    if config.gpus_per_replica > 0:
        return environment
    return environment | VLLM_CPU_ENV | {"OMP_NUM_THREADS": str(max(1, cores))}


def _rank(ranks: list[int]) -> int:
    """The least rank of vLLM's that holds all of these."""
    fitting = next((rank for rank in VLLM_LORA_RANKS if rank >= max(ranks)), None)
    if fitting is None:
        raise InputError(f"max_lora_rank: {max(ranks)}, and vLLM serves at most {VLLM_LORA_RANKS[-1]}")
    return fitting


def _text_configs(offer: Offer) -> list[Any]:
    """What each base model's `config.json` says of its text model."""
    from transformers import AutoConfig

    from jpo_ray.engine.model import resolve_model

    folders = [resolve_model(str(folder), "serve") for folder in (offer.base, *(entry.folder for entry in offer.full))]
    return [AutoConfig.from_pretrained(folder).get_text_config() for folder in folders]


def _max_model_len(config: ServeConfig, texts: list[Any]) -> int:
    """Tokens of prompt and answer together."""
    most = min((n for text in texts if (n := getattr(text, "max_position_embeddings", None))), default=None)
    if config.max_model_len is not None:
        if most and config.max_model_len > most:
            raise InputError(f"max_model_len: {config.max_model_len}, and the model takes {most}")
        return config.max_model_len
    return min(most or LONGEST_DEFAULT, LONGEST_DEFAULT)
