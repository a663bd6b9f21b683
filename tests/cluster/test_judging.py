"""Judges on the cluster: vLLM engines that compare, and requests spread over actors under one limit."""

import importlib.util
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from feedback.serving import comparisons, endpoint

from cluster.judge_model import LEARNED, VERDICTS, make_judge
from cluster.running import CLUSTER, NODES_KEY
from jpo_ray.cluster import judging
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.errors import InputError
from jpo_ray.feedback.judge import judge
from jpo_ray.pipeline.annotating import open_annotator

LOG = logging.getLogger(__name__)
HASTY = CLUSTER.model_copy(update={"actor_timeout_s": 20.0})
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", NODES_KEY)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:  # noqa: ARG001
    return make_judge(tmp_path_factory.mktemp("judge"))


def no_ray() -> Any:
    raise AssertionError("everything is answered: nothing should start")


@pytest.mark.ray
@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_a_model_judges_on_the_cluster_once(ray_cluster: Any, model: Path, parts: int) -> None:
    """By heart: a clear verdict each way, one that depends on the order, and one that is no answer even when repeated.
    What is too long is not asked. An engine split in two says the same.
    """
    config = AnnotatorConfig(
        annotator="vllm", model=str(model), prompts=str(model / "prompts.yaml"), max_answer_tokens=12, soft=True,
        tensor_parallel_size=parts,
    )  # fmt: skip
    long = LEARNED[0].__class__("k9", "i9", "i8", "Name a fruit.", "An apple. " * 40, "Say hello.", "No.")
    asked = [*LEARNED, long]
    with open_annotator(config, lambda: ray_cluster, CLUSTER, 0) as annotator:
        rows = judge(asked, annotator)
        assert len(running("EngineCore")) == 1
        assert len(running("Worker_TP")) == (parts if parts > 1 else 0)
    assert annotator.name == model.name
    assert [row["verdict"] for row in rows] == [*VERDICTS, "invalid"]
    assert (rows[2]["verdict_ab"], rows[2]["verdict_ba"]) == ("a", "b")
    assert rows[0]["text_ab"] == "Output (a)"
    assert rows[3]["text_ab"] == "Both.\n[asked again]\nSorry."
    assert rows[3]["reason"] == "the answer is neither of the two, twice"
    assert "tokens, the model takes 180 and an answer" in rows[4]["reason"]
    assert rows[0]["probability"] > 0.9
    assert rows[1]["probability"] < 0.1
    assert rows[2]["probability"] == pytest.approx(0.5, abs=0.1)
    assert rows[0]["tokens"] > 40
    assert_all_end("VLLMJudge", "EngineCore")
    with open_annotator(config, no_ray, CLUSTER, 0) as annotator:
        assert judge(LEARNED, annotator) == rows[:4]


@pytest.mark.ray
def test_requests_of_several_actors_keep_one_limit_and_are_paid_once(ray_cluster: Any) -> None:
    with endpoint(key=NODES_KEY) as server:
        config = AnnotatorConfig(
            annotator="openai", base_url=server.url, actors=2, concurrency=16, requests_per_minute=1200
        )
        started = time.monotonic()
        with open_annotator(config, lambda: ray_cluster, CLUSTER, 0) as annotator:
            rows = judge(comparisons(20), annotator)
        assert time.monotonic() - started > 39 * 0.05  # 40 requests, 50 ms apart, whoever sends them
        assert server.counts()["answers"] == server.counts()["requests"] == 40
        alone = config.model_copy(update={"actors": None, "requests_per_minute": None})
        with open_annotator(alone, no_ray, CLUSTER, 0) as annotator:
            assert judge(comparisons(20), annotator) == rows
        assert server.counts()["requests"] == 40
    assert {row["verdict"] for row in rows} >= {"a", "b"}
    assert_all_end("EndpointJudge")


@pytest.mark.ray
def test_one_cap_holds_for_all_actors(ray_cluster: Any) -> None:
    """104 tokens a request, a tenth of a cent."""
    with endpoint(key=NODES_KEY) as server:
        config = AnnotatorConfig(
            annotator="openai", base_url=server.url, actors=2, concurrency=8, prompt_price=10.0, max_cost=0.02
        )
        with (
            pytest.raises(InputError, match=r"judge.max_cost: .* are left; what was answered is kept"),
            open_annotator(config, lambda: ray_cluster, CLUSTER, 0) as annotator,
        ):
            judge(comparisons(60), annotator)
        assert 10 <= server.counts()["answers"] <= 20


@pytest.mark.ray
def test_what_fails_for_all_is_one_line_without_the_key(ray_cluster: Any) -> None:
    with endpoint(key="other") as server:
        config = AnnotatorConfig(annotator="openai", base_url=server.url, actors=2)
        with (
            pytest.raises(InputError, match="answers 401") as caught,
            open_annotator(config, lambda: ray_cluster, CLUSTER, 0) as annotator,
        ):
            judge(comparisons(3), annotator)
    assert "canary" not in str(caught.value)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The actors, once a judge has started them."""
    found: list[Any] = []
    real = judging.on_actors

    def watched(cluster: Any, start: Any, timeout_s: Any) -> Any:
        return real(cluster, lambda ray: found.extend(start(ray)) or found, timeout_s)

    monkeypatch.setattr(judging, "on_actors", watched)
    return found


@pytest.mark.ray
@pytest.mark.parametrize("for_good", [False, True])
def test_an_actor_that_dies_is_started_again_and_asked_again(
    ray_cluster: Any, started: list[Any], for_good: bool
) -> None:
    """One that is not started again is one line."""
    with endpoint(key=NODES_KEY, delay=0.2) as server, ExitStack() as stack:
        config = AnnotatorConfig(annotator="openai", base_url=server.url, actors=2, concurrency=4)
        seen = 0

        def kill_one(_: float, __: str) -> None:
            nonlocal seen
            seen += 1
            if seen == 3:
                ray_cluster.kill(started[0], no_restart=for_good)

        annotator = stack.enter_context(open_annotator(config, lambda: ray_cluster, CLUSTER, 0))
        if for_good:
            with pytest.raises(RuntimeError, match=r"^judge: waited for .*, but the actor has died and is not started"):
                judge(comparisons(10), annotator, kill_one)
            return
        rows = judge(comparisons(10), annotator, kill_one)
        assert 20 <= server.counts()["answers"] <= 24
    assert all(row["verdict"] != "invalid" for row in rows)


@pytest.mark.ray
def test_a_meter_that_dies_is_one_line(ray_cluster: Any) -> None:
    """What is spent so far is gone with it. The actor that asks it says so, in its own words and not in Ray's."""
    with endpoint(key=NODES_KEY, delay=0.2) as server, ExitStack() as stack:
        config = AnnotatorConfig(annotator="openai", base_url=server.url, actors=2, concurrency=4)

        def kill_meter(_: float, __: str) -> None:
            for process in processes("Meter"):
                process.kill()

        annotator = stack.enter_context(open_annotator(config, lambda: ray_cluster, CLUSTER, 0))
        with pytest.raises(RuntimeError) as caught:
            judge(comparisons(40), annotator, kill_meter)
    assert str(caught.value) == (
        "judge: waited for the meter of requests, but the actor has died and is not started again; Ray's logs tell why"
    )


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """It hangs, until the end."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("title", "what"), [("EndpointJudge", "a sign of life of a judge's actor"), ("Meter", "the meter of requests")]
)
def test_what_hangs_is_one_line_after_the_configured_time(ray_cluster: Any, title: str, what: str) -> None:
    """An actor that sends requests, or the one that lets them through."""
    with endpoint(key=NODES_KEY, delay=0.2) as server, ExitStack() as stack:
        config = AnnotatorConfig(annotator="openai", base_url=server.url, actors=2, concurrency=4)
        stopped_at = 0.0

        def stop_one(_: float, __: str) -> None:
            nonlocal stopped_at
            if not stopped_at:
                stopped_at = time.monotonic()
                stack.enter_context(stopped(processes(title)[0]))

        annotator = stack.enter_context(open_annotator(config, lambda: ray_cluster, HASTY, 0))
        line = rf"^judge: waited 20 s \(cluster\.actor_timeout_s\) for {what}: it hangs, or the cluster is busy$"
        with pytest.raises(TimeoutError, match=line):
            judge(comparisons(40), annotator, stop_one)
        assert 19 < time.monotonic() - stopped_at < 40
        LOG.info("SIGSTOP of %s, timeout 20 s: an error after %.1f s", title, time.monotonic() - stopped_at)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.timeout(600)
@needs_vllm
def test_a_killed_engine_is_started_again_and_one_that_hangs_is_one_line(ray_cluster: Any, model: Path) -> None:
    """The process of vLLM that the actor has started, which itself lives on."""
    config = AnnotatorConfig(
        annotator="vllm", model=str(model), prompts=str(model / "prompts.yaml"), max_answer_tokens=12
    )
    limited, new = CLUSTER.model_copy(update={"actor_timeout_s": 150.0}), LEARNED[0].__class__("k9", *"abcdef")
    with ExitStack() as stack:
        annotator = stack.enter_context(open_annotator(config, lambda: ray_cluster, limited, 0))
        assert judge(LEARNED[:1], annotator)[0]["verdict"] == VERDICTS[0]
        (engine,) = processes("EngineCore")
        began = time.monotonic()
        engine.kill()
        assert [row["verdict"] for row in judge(LEARNED, annotator)] == VERDICTS
        LOG.info("SIGKILL of a judge's engine: every answer %.1f s after", time.monotonic() - began)
        (engine,) = processes("EngineCore")
        stack.enter_context(stopped(engine))
        with pytest.raises(TimeoutError, match=r"^judge: waited 150 s \(cluster\.actor_timeout_s\) for an answer"):
            judge([new], annotator)
    assert_all_end("VLLMJudge", "EngineCore")


@pytest.mark.ray
def test_more_actors_than_the_cluster_has_room_for_is_an_error_at_once(ray_cluster: Any) -> None:
    config = AnnotatorConfig(annotator="openai", base_url="http://127.0.0.1:9/v1", actors=500)
    with (
        pytest.raises(InputError, match="judge: asks for 500 x 1 CPU"),
        open_annotator(config, lambda: ray_cluster, CLUSTER, 0) as annotator,
    ):
        judge(comparisons(1), annotator)


@pytest.mark.ray
@needs_vllm
def test_an_engine_asks_for_a_gpu_and_a_core_for_each_of_its_parts(ray_cluster: Any, model: Path) -> None:
    """Whatever `gpus_per_worker` says besides that there are GPUs."""
    if ray_cluster.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    config = AnnotatorConfig(annotator="vllm", model=str(model), tensor_parallel_size=2)
    cluster = CLUSTER.model_copy(update={"gpus_per_worker": 4.0, "num_actors": 3})
    with (
        pytest.raises(InputError, match=r"^judge: asks for 3 x 2 GPU \+ 2 CPU, but the cluster has"),
        open_annotator(config, lambda: ray_cluster, cluster, 0) as annotator,
    ):
        judge(comparisons(1), annotator)


def test_a_model_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = AnnotatorConfig(annotator="vllm", model=str(tmp_path))
    with pytest.raises(InputError, match=r"judge.model: .*no model.safetensors"), ExitStack() as stack:
        stack.enter_context(open_annotator(config, no_ray, CLUSTER, 0))


def processes(*kinds: str) -> list[psutil.Process]:
    """This session's processes with one of these in their titles."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any(kind in " ".join(process.cmdline()) for kind in kinds):
                found.append(process)
    return found


def running(*kinds: str) -> list[str]:
    """Their titles."""
    titles = []
    for process in processes(*kinds):
        with suppress(psutil.Error):
            titles.append(" ".join(process.cmdline()))
    return titles


def assert_all_end(*kinds: str) -> None:
    deadline = time.monotonic() + 30
    while running(*kinds) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not running(*kinds)
