"""Workers and actors that are killed or hang: the result is the same, every row comes once, nothing waits for ever."""

import importlib.util
import logging
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from engine.tiny import INSTRUCTIONS, LAYOUT, World, plain_scorer
from ray import cloudpickle
from safetensors.torch import load_file

from cluster import working
from cluster.running import CLUSTER, NoBar, nothing
from cluster.working import Strike
from cluster.world import LORA, Artifacts, make_artifacts
from jpo_ray.cluster import embedding, reference
from jpo_ray.cluster.sampling import generate
from jpo_ray.cluster.training import Work, run_training
from jpo_ray.config import PairsConfig, SampleConfig
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.data.tokens import prompt_ids
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.engine.step import score_all
from jpo_ray.evaluation.generation import Request, SampledModel

pytestmark = pytest.mark.ray
LOG = logging.getLogger(__name__)
TWO = CLUSTER.model_copy(update={"num_actors": 2})
SAVE_STEPS = 5
LONG = LORA.model_copy(update={"num_train_epochs": 40, "save_steps": SAVE_STEPS, "eval_steps": 120})  # 120 steps


@pytest.fixture(scope="module", autouse=True)
def _by_value() -> Iterator[None]:
    """Workers cannot import the tests."""
    cloudpickle.register_pickle_by_value(working)
    yield
    cloudpickle.unregister_pickle_by_value(working)


@pytest.fixture(scope="module")
def artifacts(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return make_artifacts(tmp_path_factory.mktemp("artifacts"), llama)


@dataclass(frozen=True)
class Told:
    """What a training under strikes noted down."""

    weights: dict[str, torch.Tensor]
    resumed_from: list[int]  # checkpoint of each attempt but the first
    repeated: list[int]  # steps of each attempt that were done again
    recovery_s: list[float]  # from each strike to the first step after it
    start_s: float  # to the very first step


def trained(
    ray: Any, config: ClusterConfig, artifacts: Artifacts, recipe: Any, folder: Path, strikes: list[Strike]
) -> Told:
    out = folder / "out"
    out.mkdir(parents=True)
    work = Work(working.struck, (folder, strikes, artifacts.inputs, artifacts.model, recipe, None))
    began = time.time()
    state = run_training(ray, config, "train", work, out, nothing)
    assert state["global_step"] == state["max_steps"]
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(
        range(1, state["max_steps"] + 1)
    )
    attempts = (folder / "rank0").read_text().splitlines()
    resumed = [int(line.rsplit("-", 1)[1]) if "checkpoint" in line else 0 for line in attempts[1:]]
    steps = [line.split() for line in (folder / "steps0").read_text().splitlines()]
    last_of = {int(attempt): int(step) for _, attempt, step in steps}
    first_time_of = {int(attempt): float(when) for when, attempt, _ in reversed(steps)}
    struck_at = [float(line) for line in (folder / "strikes").read_text().splitlines()] if strikes else []
    later = [next(t for _, t in sorted(first_time_of.items()) if t > moment) for moment in struck_at]
    return Told(
        load_file(out / "adapter_model.safetensors"),
        resumed,
        [last_of.get(number, start) - start for number, start in enumerate(resumed)],
        [after - moment for after, moment in zip(later, struck_at, strict=True)],
        first_time_of[0] - began,
    )


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(a[name], b[name]) for name in b)


def say(what: str, told: Told) -> None:
    """For docs/reliability.md, with `--log-cli-level=INFO`."""
    seconds = sorted(told.recovery_s)
    LOG.info(
        "%s: %d strikes, repeated steps %s, seconds to the next step: median %.1f, most %.1f; the start took %.1f",
        what, len(seconds), told.repeated, seconds[len(seconds) // 2], seconds[-1], told.start_s,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_steps_change_no_bit(ray_cluster: Any, artifacts: Artifacts, tmp_path: Path) -> None:
    """Of either of two workers, at or a few milliseconds after a step: while it computes, exchanges or writes."""
    draw = random.Random(0)
    steps = sorted(draw.sample(range(1, 119), 20))
    strikes = [Strike(step, draw.randrange(2), delay_s=draw.choice([0.0, draw.uniform(0, 0.05)])) for step in steps]
    config = CLUSTER.model_copy(update={"max_failures": 25})
    whole = trained(ray_cluster, config, artifacts, LONG, tmp_path / "whole", [])
    told = trained(ray_cluster, config, artifacts, LONG, tmp_path / "struck", strikes)
    say("SIGKILL of a training worker", told)
    assert len(told.recovery_s) >= 18  # a late one may come after the end of its attempt
    assert_equal(told.weights, whole.weights)
    assert max(told.repeated) <= SAVE_STEPS + 1  # the other worker may be a step ahead


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hung_training_worker_is_replaced(
    workers: int, ray_cluster: Any, artifacts: Artifacts, tmp_path: Path
) -> None:
    """Stopped, not dead: seen by the others, who wait for it, or by Ray Train, for which it has no answer."""
    config = CLUSTER.model_copy(update={"collective_timeout_s": 10, "num_workers": workers})
    whole = trained(ray_cluster, config, artifacts, LORA, tmp_path / "whole", [])
    strikes = [Strike(7, rank=workers - 1, number=signal.SIGSTOP)]
    told = trained(ray_cluster, config, artifacts, LORA, tmp_path / "struck", strikes)
    say(f"SIGSTOP of one of {workers} training workers, collective_timeout_s 10", told)
    assert told.resumed_from == [6]
    assert_equal(told.weights, whole.weights)
    slowest = max(whole.start_s, told.start_s)  # of a machine with other work: start-ups differ
    assert told.recovery_s[0] < 10 + 5 + 15 + 2 * slowest  # 5 s for the stopped one to leave its process group
    assert_none_stopped()


def assert_none_stopped(within_s: float = 15) -> None:
    """No process below this one hangs."""
    deadline = time.monotonic() + within_s
    while stopped := [child for child in psutil.Process().children(recursive=True) if _state(child) == "stopped"]:
        assert time.monotonic() < deadline, stopped
        time.sleep(0.2)


def _state(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return "gone"


def test_killed_reference_actors_lose_and_repeat_nothing(
    ray_cluster: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two actors, each killed in its second micro-batch, and one of their successors too."""
    monkeypatch.setattr(reference, "PASS_TOKENS", 60)
    scorer = working.fragile(reference.ReferenceScorer, tmp_path, calls=2, deaths=3)
    monkeypatch.setattr(reference, "ReferenceScorer", scorer)
    advanced: list[int] = []
    values, scored = reference.reference_scores(
        ray_cluster, TWO, world.tokens, model=world.model, dtype="float32", load_in_4bit=False,
        cache=tmp_path / "cache", key={"test": 1}, begin=nothing, advance=advanced.append,
    )  # fmt: skip
    assert len(list(tmp_path.glob("death-*"))) == 3
    assert scored == sum(advanced) == 24  # each sequence once
    plain = score_all(plain_scorer(world.model), world.tokens, np.arange(24), max_tokens=400).numpy()
    assert np.abs(values - plain).max() < 1e-5


def test_killed_embedding_actors_lose_and_repeat_nothing(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_encoder: str
) -> None:
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedding, "EMBED_BATCH", 8)
    texts = {f"id{n:03}": f"name {n} fruits" for n in range(100)}
    bars = [NoBar(), NoBar()]
    config = PairsConfig(embedder=tiny_encoder)
    plain = embedding.embed_texts(ray_cluster, TWO, config, texts, bars[0])
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "another"))
    embedder = working.fragile(embedding.Embedder, tmp_path, calls=2, deaths=3)
    monkeypatch.setattr(embedding, "Embedder", embedder)
    found = embedding.embed_texts(ray_cluster, TWO, config, texts, bars[1])
    assert len(list(tmp_path.glob("death-*"))) == 3
    assert bars[1].done == bars[1].total == 100
    assert found.vectors.tobytes() == plain.vectors.tobytes()


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sentence encoder of random weights."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[UNK]", "name", "fruits", *map(str, range(100))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = np.random.default_rng(0).normal(size=(len(words), 16)).astype(np.float32)
    encoder = StaticEmbedding(tokenizer, embedding_weights=weights)
    SentenceTransformer(modules=[encoder], device="cpu").save(str(folder / "encoder"))
    return str(folder / "encoder")


@pytest.mark.slow
def test_a_hung_reference_actor_is_an_error_in_time_and_leaves_the_cluster_free(
    ray_cluster: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two actors stops in its second micro-batch. The next call gets their places."""
    monkeypatch.setattr(reference, "PASS_TOKENS", 60)
    real, config = reference.ReferenceScorer, TWO.model_copy(update={"actor_timeout_s": 90.0, "wait_s": 60.0})
    hung = working.fragile(real, tmp_path, calls=2, deaths=1, number=signal.SIGSTOP)

    def score() -> int:
        return reference.reference_scores(
            ray_cluster, config, world.tokens, model=world.model, dtype="float32", load_in_4bit=False,
            cache=tmp_path / "cache", key={"test": 1}, begin=nothing, advance=nothing,
        )[1]  # fmt: skip

    monkeypatch.setattr(reference, "ReferenceScorer", hung)
    with pytest.raises(TimeoutError, match=r"^reference: nothing came for 90 s \(cluster\.actor_timeout_s\)"):
        score()
    (death,) = tmp_path.glob("death-*")
    LOG.info(
        "SIGSTOP of a reference actor, actor_timeout_s 90: an error %.1f s later", time.time() - death.stat().st_mtime
    )
    pid = int(death.name.removeprefix("death-"))
    monkeypatch.setattr(reference, "ReferenceScorer", real)
    started = time.monotonic()
    assert 0 < score() < 24  # what came before the error is kept
    LOG.info("the next pool has its places and results after %.1f s", time.monotonic() - started)
    assert not psutil.pid_exists(pid) or os.getpid() == pid


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize("victim", ["vLLMEngineStage", "EngineCore"])
def test_a_killed_engine_answers_every_request_once(victim: str, ray_cluster: Any, llama: Path) -> None:
    """Its actor, or the process of vLLM that the actor has started: the latter does not outlive the former."""
    base = SampledModel("base", llama, llama)
    prompts = prompt_ids(load_tokenizer(llama), LAYOUT, INSTRUCTIONS)
    requests = [Request(n, base, prompts[n % len(prompts)], 1.0, n) for n in range(600)]
    answers = generate(
        ray_cluster, CLUSTER, SampleConfig(max_new_tokens=48, timeout_s=400), "vllm", "float32", requests
    )
    found = [next(answers)]
    engines = below("EngineCore")
    struck = below(victim)
    assert engines
    assert struck
    began = time.monotonic()
    for process in struck:
        process.kill()
    found += answers
    LOG.info("SIGKILL of %s after the first answers: the rest came %.1f s after", victim, time.monotonic() - began)
    assert sorted(answer.number for answer in found) == list(range(600))
    assert not any(answer.error for answer in found)
    assert psutil.wait_procs(engines, timeout=20)[1] == []


def below(name: str) -> list[psutil.Process]:
    """Processes below this one with `name` in their title."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(child.cmdline()) or name in child.name():
                found.append(child)
        except psutil.Error:
            continue
    return found
