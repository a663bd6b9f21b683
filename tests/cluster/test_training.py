"""Training on Ray Train's workers: the same result as in one process, killed or not; errors come back as they are."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file

from cluster import working
from cluster.running import CLUSTER, nothing
from cluster.world import FULL, LORA, Artifacts, make_artifacts
from jpo_ray.cluster.training import Work, run_training
from jpo_ray.engine.jobs import train_preferences
from jpo_ray.engine.merging import merge_adapter
from jpo_ray.errors import InputError

pytestmark = pytest.mark.ray
BEFORE = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in the background

# Of the distance that training moved the weights. AdamW turns the rounding of gradients near zero into a share of a
# step: two micro-batches instead of one, in one process, make 3e-4 with all parameters and 2e-6 with LoRA.
TOLERANCE = 2e-3


@pytest.fixture(scope="module", autouse=True)
def _by_value() -> Iterator[None]:
    """Workers cannot import the tests."""
    cloudpickle.register_pickle_by_value(working)
    yield
    cloudpickle.unregister_pickle_by_value(working)


@pytest.fixture(scope="module")
def artifacts(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return make_artifacts(tmp_path_factory.mktemp("artifacts"), llama)


@pytest.fixture(scope="module")
def artifacts_4bit(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return make_artifacts(tmp_path_factory.mktemp("artifacts-4bit"), llama, load_in_4bit=True)


@pytest.fixture(scope="module")
def jobs(artifacts: Artifacts, artifacts_4bit: Artifacts) -> dict[str, tuple[Any, ...]]:
    """Arguments of five trainings: LoRA with dropout, all parameters, both sharded with checkpointed activations and at
    least two micro-batches a step, and LoRA on 4-bit weights.
    """
    quantised = LORA.model_copy(update={"name": "nf4", "num_train_epochs": 1})
    sharded = {"sharding": "fsdp2", "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    return {
        "lora": (artifacts.inputs, artifacts.model, LORA, None),
        "full": (artifacts.inputs, artifacts.model, FULL, None),
        "lora-fsdp2": (artifacts.inputs, artifacts.model, LORA.model_copy(update=sharded), None),
        "full-fsdp2": (artifacts.inputs, artifacts.model, FULL.model_copy(update=sharded), None),
        "nf4": (artifacts_4bit.inputs, artifacts_4bit.model, quantised, None),
    }


@pytest.fixture(scope="module")
def on_two(
    ray_cluster: Any, jobs: dict[str, tuple[Any, ...]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The trainings by two workers: their folder and states."""
    out = tmp_path_factory.mktemp("on-two") / "out"
    for name in jobs:
        (out / name).mkdir(parents=True)
    return out, run_training(ray_cluster, CLUSTER, "train", Work(working.several, (jobs,)), out, nothing)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Euclidean, over all weights."""
    return float(sum((a[name].float() - b[name].float()).pow(2).sum() for name in a)) ** 0.5


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("lora", "adapter_model.safetensors"),
        ("full", "model.safetensors"),
        ("lora-fsdp2", "adapter_model.safetensors"),
        ("full-fsdp2", "model.safetensors"),
        ("nf4", "adapter_model.safetensors"),
    ],
)
def test_two_workers_train_what_one_process_trains(
    llama: Path,
    on_two: tuple[Path, dict[str, Any]],
    jobs: dict[str, tuple[Any, ...]],
    tmp_path: Path,
    name: str,
    file: str,
) -> None:
    out, states = on_two
    alone = train_preferences(tmp_path, "cpu", None, *jobs[name])
    assert states[name]["global_step"] == alone["global_step"] == (3 if name == "nf4" else 12)
    assert states[name]["comparisons"] == 12
    losses = [[entry["loss"] for entry in state["log_history"]] for state in (alone, states[name])]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    # Log 2 while every margin is zero: before the first update, and after it, whose warm-up rate is zero.
    assert losses[0][:2] == pytest.approx([0.693147] * 2, abs=1e-5)
    assert abs(losses[0][2] - 0.693147) > 0.003
    one, two = (load_file(folder / file) for folder in (tmp_path, out / name))
    assert one.keys() == two.keys()
    start = load_file(llama / file) if "full" in name else {key: one[key] * ("lora_A" in key) for key in one}
    assert distance(one, start) > 0.02
    assert distance(one, two) < TOLERANCE * distance(one, start)
    assert not list(out.parent.glob("ray-*"))  # Ray Train's own notes are gone


def test_ctrl_c_is_handled_after_training_as_before_it(on_two: tuple[Path, dict[str, Any]]) -> None:
    """Ray Train leaves its own handler, which would swallow the interruption of a later stage."""
    assert on_two
    assert signal.getsignal(signal.SIGINT) is BEFORE


def test_four_bit_weights_with_another_reference_are_refused(artifacts: Artifacts, tmp_path: Path) -> None:
    """The check that the quantised training above passed does see a reference of unquantised weights."""
    model = artifacts.model.model_copy(update={"load_in_4bit": True})
    with pytest.raises(InputError, match=r"the reference log-probs do not belong to this model: they differ by"):
        train_preferences(tmp_path, "cpu", None, artifacts.inputs, model, LORA, None)


def test_an_adapter_trained_on_four_bits_is_merged_into_the_unquantised_weights(
    llama: Path, on_two: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    trained = on_two[0] / "nf4"
    facts = merge_adapter(trained, llama, tmp_path / "merged", "float32")
    assert facts["note"].startswith("trained on 4-bit weights, merged into the unquantised ones")
    adapter = load_file(trained / "adapter_model.safetensors")
    base, merged = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "merged"))
    updates = {
        name.removeprefix("base_model.model.").removesuffix("lora_A.weight") + "weight": (
            adapter[name.replace("lora_A", "lora_B")] @ weight * (LORA.lora_alpha / LORA.lora_r)
        )
        for name, weight in adapter.items()
        if "lora_A" in name
    }
    assert min(float(update.abs().max()) for update in updates.values()) > 0
    assert merged.keys() == base.keys() > updates.keys()
    for name, weight in base.items():
        torch.testing.assert_close(merged[name], weight + updates.get(name, torch.zeros(1)), rtol=0, atol=1e-6)


def test_a_killed_worker_is_replaced_and_the_result_is_the_same(
    ray_cluster: Any, on_two: tuple[Path, dict[str, Any]], jobs: dict[str, tuple[Any, ...]], tmp_path: Path
) -> None:
    """Rank 1 is killed after 7 of 12 steps; both workers start again from the checkpoint of step 6."""
    out = tmp_path / "out"
    out.mkdir()
    work = Work(working.struck, (tmp_path, [working.Strike(7, rank=1)], *jobs["lora"]))
    shown: list[tuple[int, int]] = []
    state = run_training(ray_cluster, CLUSTER, "train", work, out, lambda done, total, _: shown.append((done, total)))
    assert (tmp_path / "strikes").read_text().count("\n") == 1
    for rank in (0, 1):
        lines = (tmp_path / f"rank{rank}").read_text().splitlines()
        assert lines == ["2 workers from the start", "2 workers from checkpoint-6"]
    whole, states = on_two
    resumed, expected = (load_file(folder / "adapter_model.safetensors") for folder in (out, whole / "lora"))
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)
    assert (state["global_step"], state["num_tokens"]) == (12, states["lora"]["num_tokens"])
    assert [entry["step"] for entry in state["log_history"]] == list(range(1, 13))
    assert shown[-1] == (12, 12)


@pytest.mark.parametrize("ranks", [(), (0,)])
def test_bad_input_found_by_a_worker_comes_back_as_such_without_retries(
    ranks: tuple[int, ...], ray_cluster: Any, tmp_path: Path
) -> None:
    """By all workers, or by one for whom the others wait."""
    patient = CLUSTER.model_copy(update={"collective_timeout_s": 3600})
    with pytest.raises(InputError, match=r"^data\.jsonl line 3: `text` is missing$"):
        run_training(
            ray_cluster, patient, "train", Work(working.refused, (tmp_path, *ranks)), tmp_path / "out", nothing
        )
    # Once in each rank, or not at all where the other had ended it before.
    assert {path.read_text() for path in tmp_path.glob("rank*")} == {"an attempt\n"}


def test_a_worker_that_fails_ends_the_run_though_another_waits_for_it(ray_cluster: Any, tmp_path: Path) -> None:
    once = CLUSTER.model_copy(update={"max_failures": 0})
    started = time.monotonic()
    with pytest.raises(Exception, match=r"step 7: loss nan"):
        run_training(ray_cluster, once, "train", Work(working.failing, (tmp_path,)), tmp_path / "out", nothing)
    assert time.monotonic() - started < CLUSTER.collective_timeout_s
    assert (tmp_path / "rank1").read_text() == "an attempt\n"


def test_a_worker_that_finishes_no_step_is_started_again(ray_cluster: Any, tmp_path: Path) -> None:
    """Alone, so that no other waits for it, and its process answers Ray."""
    alone = CLUSTER.model_copy(update={"num_workers": 1, "progress_timeout_s": 3.0})
    work = Work(working.stuck, (tmp_path,))
    assert run_training(ray_cluster, alone, "train", work, tmp_path / "out", nothing) == "done"
    assert (tmp_path / "rank0").read_text() == "an attempt\nan attempt\n"


def test_one_that_never_finishes_a_step_ends_in_one_line(ray_cluster: Any, tmp_path: Path) -> None:
    once = CLUSTER.model_copy(update={"num_workers": 1, "progress_timeout_s": 3.0, "max_failures": 0})
    with pytest.raises(TimeoutError, match=r"^train: no step for 3 s \(cluster\.progress_timeout_s\); the log"):
        run_training(ray_cluster, once, "train", Work(working.stuck, (tmp_path,)), tmp_path / "out", nothing)
