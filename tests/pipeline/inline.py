"""The pipeline without Ray: what runs on a cluster runs in this process instead, and is noted.

Everything above the cluster is the real thing: stages, run directory, data, engine. Embeddings alone are made up, from
hashes of the texts.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from jpo_ray.cluster import embedding, policy, reference, resources, sampling, shards, spreading, tiles, training
from jpo_ray.config import RunConfig
from jpo_ray.config_file import parse_config
from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.micro_batches import micro_batches
from jpo_ray.engine.model import load_model
from jpo_ray.engine.scoring import make_scorer, score_items
from jpo_ray.evaluation.generation import Generated, Request, TransformersSampler
from jpo_ray.pairs.plans import run_task
from jpo_ray.pipeline import STAGES, run_stages
from jpo_ray.pipeline.context import Context


@dataclass
class Cluster:
    """What stages asked of the cluster, in order; `dies_at_step` ends the next training after that step."""

    calls: list[str] = field(default_factory=list)
    dies_at_step: int | None = None

    def embed_texts(self, _ray: Any, _cluster: Any, _config: Any, texts: Mapping[str, str], bar: Any) -> Any:
        self.calls.append("embed")
        rows = [
            np.random.default_rng(list(hashlib.sha256(text.encode()).digest())).normal(size=12)
            for text in texts.values()
        ]
        vectors = np.stack(rows) + 0.5
        bar.advance(len(texts))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
        return embedding.Embedded(vectors, cached=0, truncated=0)

    def tasks(
        self, _ray: Any, sides: Any, vectors: Any, plan: Any, tasks: list[int], search: Any
    ) -> Iterator[tuple[int, bytes]]:
        if self.calls[-1:] != ["tiles"]:  # however many passes
            self.calls.append("tiles")
        for task in tasks:
            yield task, tiles.encoded(run_task(plan, task, *sides, vectors.array, search))

    def map_shards(
        self, _ray: Any, _config: Any, _stage: str, function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]],
        *shared: Any,
    ) -> Iterator[Any]:  # fmt: skip
        for each in arguments:
            if self.calls[-1:] != ["shards"]:
                self.calls.append("shards")
            yield function(*shared, *each)

    def run_training(
        self, _ray: Any, _config: Any, stage: str, work: training.Work, out: Path, show: Any
    ) -> dict[str, Any]:
        self.calls.append(stage)

        def progress(done: int, total: int, metrics: dict[str, float]) -> None:
            show(done, total, metrics)
            if done == self.dies_at_step:
                self.dies_at_step = None
                raise KeyboardInterrupt

        training.fetch_checkpoints(out)
        state: dict[str, Any] = work.function(out, "cpu", progress, *work.arguments)
        return state

    def scored(
        self, _ray: Any, _config: Any, tokens: TokenizedItems, missing: Any, model: Path, dtype: str, four_bit: bool
    ) -> Iterator[Any]:
        if not len(missing):
            return
        self.calls.append(f"score {len(missing)}")
        import torch

        scorer = make_scorer(load_model(model, dtype=dtype, load_in_4bit=four_bit))
        for members in micro_batches(tokens, missing, 8192, packed=True):
            with torch.no_grad():
                yield members, score_items(scorer, tokens, members).numpy()

    def policy_facts(
        self, _ray: Any, _config: Any, stage: str, tokens: TokenizedItems, *, policies: Any, fact: Any, bar: Any,
        **where: Any,
    ) -> Any:  # fmt: skip
        self.calls.append(f"{stage}: {fact} of {len(policies)}")
        with pytest.MonkeyPatch.context() as patch:  # another number of threads, and training differs in the last bit
            patch.setattr("torch.set_num_threads", lambda _: None)
            reader = policy.PolicyReader(**where, fact=fact, device="cpu", threads=0)
        bar.begin(sum(len(rows) for _, rows in policies))
        return [reader.read(folder, tokens, rows) for folder, rows in policies]

    def generate(
        self, _ray: Any, _cluster: Any, config: Any, engine: str, dtype: str, requests: Sequence[Request]
    ) -> Iterator[Generated]:
        self.calls.append(f"sample {len(requests)} with {engine}")
        for base in dict.fromkeys(request.model.base for request in requests):
            here = [request for request in requests if request.model.base == base]
            adapters = list({r.model.path: r.model for r in here if r.model.is_adapter}.values())
            sampler = TransformersSampler(base, adapters, dtype, "cpu")
            for group in sampling._groups(here):
                yield from sampler.generate(group, config.max_new_tokens, config.stop)


def install(patch: pytest.MonkeyPatch) -> Cluster:
    """Put a `Cluster` in the place of Ray."""
    cluster = Cluster()
    patch.setattr(embedding, "embed_texts", cluster.embed_texts)
    patch.setattr(resources, "await_resources", lambda *_: None)
    patch.setattr(tiles, "_tasks_on_ray", cluster.tasks)
    for module in (shards, spreading):
        patch.setattr(module, "map_shards", cluster.map_shards)
    patch.setattr(policy, "policy_facts", cluster.policy_facts)
    patch.setattr(training, "run_training", cluster.run_training)
    patch.setattr(reference, "_scored", cluster.scored)
    patch.setattr(sampling, "generate", cluster.generate)
    patch.setattr(Context, "ray", lambda _: SimpleNamespace(put=lambda value: value, get=lambda value: value))
    return cluster


def small_config(**sections: Any) -> RunConfig:
    """A few dozen sandbox items, one epoch of everything. Sections replace those here."""
    values: dict[str, Any] = {
        "seed": 0,
        "items": {split: [{"path": "sandbox", "limit": n}] for split, n in LIMITS.items()},
        "model": {"model_name_or_path": "sandbox", "max_length": 256},
        "judge": {"annotator": "sandbox", "noise": 0.05, "tie_band": 0.05},
        "sft": {"learning_rate": 1e-3, "num_train_epochs": 1, "items_per_step": 16, "warmup_steps": 0},
        "train": [JPO, DPO],
        "sample": {"engine": "transformers", "temperatures": [0.7], "max_new_tokens": 16},
    }
    return parse_config(values | sections, "test")


LIMITS = {"train": 48, "validation": 12, "test": 6}
JPO: dict[str, Any] = {
    "name": "jpo", "objective": "jpo", "beta": 0.2, "learning_rate": 1e-3, "num_train_epochs": 1, "warmup_steps": 0,
    "comparisons_per_step": 16, "save_steps": 2,
}  # fmt: skip
DPO = JPO | {"name": "dpo", "objective": "dpo", "protocols": ["conditional"], "steps_like": "jpo"}


def run(config: RunConfig, run_dir: Path | str, stages: Sequence[str] = tuple(STAGES)) -> str:
    """Run stages; returns what was printed."""
    shown = io.StringIO()
    run_stages(config, run_dir, stages, Console(file=shown, width=200))
    return shown.getvalue()
