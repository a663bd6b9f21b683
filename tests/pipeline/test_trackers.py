"""Win rates at trackers: the key is asked for before anything is judged, and what is judged outlives a tracker."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from engine.events import scalars
from engine.test_tracking import wandb  # noqa: F401

from jpo_ray.errors import InputError
from jpo_ray.files import read_json
from pipeline.inline import Cluster, run, small_config


@pytest.mark.usefixtures("wandb")
def test_the_key_is_checked_on_the_driver_which_sends_win_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainings on a cluster's workers need no key here."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = small_config(report_to=["wandb"])
    with pytest.raises(InputError, match="Weights & Biases has no key"):
        run(config, tmp_path / "run", ["evaluate"])
    with pytest.raises(InputError, match="no `items` yet"):
        run(config, tmp_path / "run", ["train"])
    run(small_config(report_to=["wandb"], evaluate=None), tmp_path / "run", ["evaluate"])


def test_a_tracker_that_fails_leaves_what_was_judged(
    run_dir: Path,
    cluster: Cluster,
    wandb: None,  # noqa: ARG001, F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import wandb as package

    def fails(**_: Any) -> None:
        raise package.errors.CommError("no route to [host]")

    monkeypatch.setenv("WANDB_MODE", "offline")  # what needs no key
    monkeypatch.setattr(package, "init", fails)
    before = read_json(run_dir / "evaluate" / "win_rates.json")
    shutil.rmtree(run_dir / "evaluate")
    shutil.rmtree(run_dir / "logs")
    shown = run(small_config(report_to=["tensorboard", "wandb"]), run_dir, ["evaluate"])
    assert read_json(run_dir / "evaluate" / "win_rates.json") == before
    assert shown.count("warning: win rates of ") == 1
    assert "are not in wandb" in shown
    assert "no route to [host]" in shown
    assert "delete that folder and run `jpo evaluate` again" in shown
    for name, entry in before["models"].items():
        ((_, rate),) = scalars(run_dir / "logs" / name / "evaluate")["test/win_rate/mean"]
        assert rate == pytest.approx(entry["win_rate"]["mean"])
    assert cluster.calls == []
