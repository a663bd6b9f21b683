"""The configuration of `jpo serve`. Imports neither torch nor ray."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from jpo_ray.config_base import NAME_PATTERN, Count, NonNegative, Positive, Section
from jpo_ray.config_file import apply_override, read_yaml, validated
from jpo_ray.errors import InputError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEYS_VARIABLE = "JPO_API_KEYS"

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Port = Annotated[int, Field(ge=0, lt=2**16)]


class Limits(Section):
    """What one request, and all of them together, may ask for."""

    max_body_bytes: Count = 1_000_000
    max_tokens: Count = 1024  # of an answer; also what a request gets that names no number
    max_n: Count = 8  # answers to one prompt, and prompts of one request
    max_items: Count = 64  # instruction-response pairs of one /v1/score or /v1/compare
    max_requests: Count = 256  # under way at a time, on each replica; more are refused with 429
    retry_after_s: Count = 1  # what a refused client is told to wait


class ScoringConfig(Section):
    """`/v1/score` and `/v1/compare`: the project's own engine, in actors beside the ones that generate."""

    replicas: Count = 1
    cpus_per_replica: NonNegative = 0.0  # reserved; with 0 scoring shares the cores of whoever is idle
    gpus_per_replica: NonNegative = 0.0
    max_batch_items: Count = 64  # items of several requests that go through the model together; a larger one goes alone
    batch_wait_s: NonNegative = 0.005
    beta: Positive = 0.1  # of models that come without the manifest of their training


class ServeConfig(Section):
    run_dir: str | None = None  # run whose SFT model, adapters and full models are served
    models: list[Name] | None = None  # which of them; default: all (`sft` is the SFT model)
    adapters: dict[Name, str] = {}  # more adapters of the same base: name -> folder
    whole_models: dict[Name, str] = {}  # merged or fully trained models of the same tokenizer: name -> folder
    adapter_folders: list[str] = []  # whence a running server may add adapters, besides the run's own
    state_dir: str | None = None  # a folder below has the server's copies of adapters; default: RUN_DIR/serving
    max_adapters: Count = 8  # at a time
    max_lora_rank: Count = 8  # of adapters to come; those that are there at start may raise it; on CPUs it costs speed

    host: str = "127.0.0.1"  # of the HTTP proxies; any other than a loopback address needs keys
    port: Port = 8000
    # File with API keys, one a line. Keys may also stand in the variable JPO_API_KEYS, separated by commas or spaces.
    keys_file: str | None = None
    allowed_origins: list[str] = []  # of web pages elsewhere whose scripts may call (CORS); `*` is refused
    limits: Limits = Limits()

    replicas: Count = 1  # engines of each base model
    max_replicas: Count | None = None  # more than `replicas`: as many as the load needs, up to these
    target_requests: Positive = 32  # under way on each replica, that scaling aims at
    cpus_per_replica: Positive = 1.0
    gpus_per_replica: NonNegative = 0.0  # of each of its tensor_parallel_size workers
    tensor_parallel_size: Count = 1
    max_model_len: Count | None = None  # tokens of prompt and answer; default: what the model takes, at most 4096
    max_num_seqs: Count | None = None  # answers that are generated at a time; default: vLLM's
    scoring: ScoringConfig | None = ScoringConfig()  # null: without /v1/score and /v1/compare
    stream_interval_s: NonNegative = 0.05  # under load, tokens of one stream are sent together this often
    drain_timeout_s: Positive = 60.0  # for streams under way when the server is stopped
    # One engine on a local cluster listens itself, so that nothing stands before it. false: Serve's proxy does.
    direct: bool = True
    address: str | None = None  # of a running Ray cluster; default: RAY_ADDRESS, else a local one

    @model_validator(mode="after")
    def _fits_together(self) -> "ServeConfig":
        if "*" in self.allowed_origins:
            raise ValueError("allowed_origins: name the origins; `*` would let every web page call")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below replicas {self.replicas}")
        for key, names in (("adapters", self.adapters), ("whole_models", self.whole_models)):
            if "sft" in names:
                raise ValueError(f"{key}: the name `sft` is the SFT model's; choose another")
        if both := self.adapters.keys() & self.whole_models.keys():
            raise ValueError(f"whole_models: there is an adapter `{min(both)}` too; choose another name")
        return self


def load_serve_config(path: Path | None, overrides: list[str], run_dir: Path | None = None) -> ServeConfig:
    """From a file, if any (its keys, or what `serve deploy` takes), and `key=value` overrides. Raises `InputError`."""
    values = _of_file(path) if path is not None else {}
    if run_dir is not None:
        values["run_dir"] = str(run_dir)
    for override in overrides:
        apply_override(values, override)
    return validated(ServeConfig, values, str(path) if path is not None else "serve")


def _of_file(path: Path) -> dict[str, Any]:
    values = read_yaml(path, "--config")
    if "applications" not in values:
        return values
    try:
        arguments = dict(values["applications"][0].get("args") or {})
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: its first application has no `args`") from error
    http = values.get("http_options") or {}
    return {key: http[key] for key in ("host", "port") if key in http} | arguments
