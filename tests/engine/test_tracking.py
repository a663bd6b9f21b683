"""What trainings log is in TensorBoard's event files and Weights & Biases' runs, each step once."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.events import scalars
from engine.test_checkpoints import STEPS, StoppedError, recipe_of, stop
from engine.tiny import World
from jpo_ray.config import BaseModelConfig
from jpo_ray.engine.loop import train
from jpo_ray.engine.model import load_policy, load_tokenizer
from jpo_ray.engine.scoring import make_scorer
from jpo_ray.engine.tasks import preference_task
from jpo_ray.engine.tracking import Tracking, check_trackers, tracked, trackers_of
from jpo_ray.errors import InputError

HISTORY = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "rewards/margins": 1.5}, {"step": 2, "eval_loss": 0.75}]


def run(world: World, out: Path, tracking: Tracking, progress: Callable[..., None] | None = None) -> dict[str, Any]:
    recipe = recipe_of("lora")
    policy = load_policy(world.model, BaseModelConfig(model_name_or_path="-"), recipe, seed=1)
    task = preference_task(make_scorer(policy, dropout_seed=1), world.data, recipe, seed=1)
    return train(policy, load_tokenizer(world.model), task, recipe, out, progress=progress, tracking=tracking)


def test_a_training_that_goes_on_logs_each_step_once(world: World, tmp_path: Path) -> None:
    """Stopped in step 5, which it does again from the checkpoint of step 4; step 4 itself is logged once."""
    tracking = Tracking(("tensorboard",), tmp_path, "jpo", "key")
    with pytest.raises(StoppedError):
        run(world, tmp_path / "out", tracking, stop)
    assert [step for step, _ in scalars(tracking.folder)["train/loss"]] == [1, 2, 3, 4]
    state = run(world, tmp_path / "out", tracking)
    found = scalars(tracking.folder)
    assert [step for step, _ in found["train/loss"]] == [*range(1, STEPS + 1)]
    assert [step for step, _ in found["eval/loss"]] == [3, 6]
    for entry in state["log_history"]:
        names = {name: f"train/{name}" for name in entry if not name.startswith("eval_")}
        names |= {name: f"eval/{name.removeprefix('eval_')}" for name in entry if name.startswith("eval_")}
        names.pop("step")
        for name, tag in names.items():
            if name != "epoch":  # of training and evaluation entries
                assert (entry["step"], pytest.approx(entry[name], rel=1e-6)) in found[tag]
    assert {"train/rewards/chosen", "train/joint/margin_instruction", "eval/rewards/accuracies"} <= found.keys()


def test_another_training_of_the_name_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    with tracked(Tracking(("tensorboard",), tmp_path, "jpo", "one"), HISTORY):
        pass
    other = Tracking(("tensorboard",), tmp_path, "jpo", "other")
    with tracked(other, []) as write:
        write({"step": 7, "loss": 2.0, "nothing": None})
    assert scalars(other.folder) == {"train/loss": [(7, 2.0)]}


def test_none_is_nothing_and_all_is_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trackers_of(["none"]) == ()
    assert trackers_of(["wandb", "tensorboard"]) == ("tensorboard", "wandb")
    assert trackers_of(["all"])[0] == "tensorboard"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert trackers_of(["all"]) == ("tensorboard",)
    with tracked(Tracking((), tmp_path, "jpo", "key"), HISTORY) as write:
        write(HISTORY[0])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights & Biases as a new process finds it: it reads the environment once."""
    package = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    package.teardown()
    yield
    package.teardown()


@pytest.mark.usefixtures("wandb")
def test_wandb_that_is_not_there_or_has_no_key_is_said_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    check_trackers(["tensorboard"], here=True)
    with pytest.raises(InputError, match="has no key; run `wandb login`"):
        check_trackers(["wandb"], here=True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"], here=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install wandb"):
        check_trackers(["wandb"], here=False)


@pytest.mark.usefixtures("wandb")
def test_a_run_of_wandb_has_the_same_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline; begun anew where a training goes on, so that what is uploaded later has each step once."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracking = Tracking(("tensorboard", "wandb"), tmp_path, "jpo", "key", {"beta": 0.5})
    for history in ([], HISTORY[:1]):
        with tracked(tracking, history) as write:
            for entry in HISTORY[len(history) :]:
                write(entry)
    (file,) = tracking.folder.glob("wandb/offline-run-*/run-*.wandb")
    rows = logged(file)
    assert [row["_step"] for row in rows] == [1, 2]
    assert (rows[0]["train/loss"], rows[1]["train/loss"], rows[1]["train/rewards/margins"]) == (0.5, 0.25, 1.5)
    assert rows[1]["eval/loss"] == 0.75
    assert scalars(tracking.folder).keys() == {"train/loss", "train/rewards/margins", "eval/loss"}


def logged(file: Path) -> list[dict[str, Any]]:
    """History rows of an offline run: after a header of 7 bytes, records of checksum, length, kind and data."""
    from wandb.proto import wandb_internal_pb2

    written, place, rows = file.read_bytes(), 7, []
    assert len(written) < 32_768  # longer ones have records in parts
    while place < len(written):
        _, length, kind = struct.unpack_from("<IHB", written, place)
        assert kind == 1
        record = wandb_internal_pb2.Record()
        record.ParseFromString(written[place + 7 : place + 7 + length])
        place += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows
