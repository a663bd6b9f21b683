"""`jpo scale`: runs that share what they can, go on where they were stopped, and are set side by side."""

import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from jpo_ray.cli import main
from jpo_ray.cluster.resources import await_resources
from jpo_ray.cluster.trials import run_trials
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.config_experiment import load_experiment
from jpo_ray.errors import InputError
from jpo_ray.files import read_json
from jpo_ray.pipeline import run_stages
from jpo_ray.pipeline.scale import scale
from pipeline.inline import JPO, Cluster, install, small_config


def written(folder: Path, grid: dict[str, list[object]], **override: object) -> Path:
    folder.mkdir(exist_ok=True)
    base = small_config(train=[JPO | {"eval_steps": None}]).model_dump(mode="json")
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    path = folder / "sizes.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "override": override, "grid": grid}, sort_keys=False))
    return path


def carry_out(path: Path, folder: Path) -> str:
    shown = io.StringIO()
    scale(load_experiment(path, []), folder, path.stem, Console(file=shown, width=120))
    return shown.getvalue()


def test_entries_share_a_run_and_runs_share_artifacts(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))
    grid: dict[str, list[object]] = {
        "pairs.joint.budget": [10, 40], "train.jpo.max_train_comparisons": [8, 16], "train.jpo.seed": [0, 1]
    }  # fmt: skip
    path = written(tmp_path / "configs", grid)
    shown = carry_out(path, tmp_path / "out")
    assert cluster.calls.count("embed") == cluster.calls.count("sft") == 1  # the second run took them over
    scored = sum(int(call.removeprefix("score ")) for call in cluster.calls if call.startswith("score"))
    tables = [tmp_path / "out" / name / "reference" / "reference.parquet" for name in ("10", "40")]
    assert scored == len({row["item_id"] for table in tables for row in pq.read_table(table).to_pylist()})  # each once
    assert len([call for call in cluster.calls if call.startswith("train-")]) == 8
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    kinds = [(group["entry"], group["settings"]) for group in results["groups"]]
    assert kinds[:3] == [
        ("sft", {"budget": 10}),
        ("jpo", {"budget": 10, "max_train_comparisons": 8}),
        ("jpo", {"budget": 10, "max_train_comparisons": 16}),
    ]
    assert [len(group["repetitions"]) for group in results["groups"]] == [1, 2, 2, 1, 2, 2]
    assert "run 2 of 2: 40" in shown
    first, second = (tmp_path / "out" / name / "sft" / "model.safetensors" for name in ("10", "40"))
    assert first.stat().st_ino == second.stat().st_ino
    calls = len(cluster.calls)
    assert "stands already" in carry_out(path, tmp_path / "out")
    assert len(cluster.calls) == calls


def test_an_experiment_goes_on_where_it_was_stopped(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))
    path = written(tmp_path / "configs", {"train.jpo.seed": [0, 1]})
    cluster.dies_at_step = 2
    with pytest.raises(KeyboardInterrupt):
        carry_out(path, tmp_path / "out")
    before = list(cluster.calls)
    carry_out(path, tmp_path / "out")
    assert "embed" in before
    assert "embed" not in cluster.calls[len(before) :]
    assert cluster.calls.count("train-jpo-s0") == cluster.calls.count("train-jpo-s1") == 1
    assert (tmp_path / "out" / "index.html").exists()


def test_without_win_rates_there_is_nothing_to_compare(tmp_path: Path, cluster: Cluster) -> None:
    path = written(tmp_path / "configs", {"train.jpo.seed": [0]}, evaluate=None)
    with pytest.raises(InputError, match="`evaluate` is off"):
        carry_out(path, tmp_path / "out")
    assert cluster.calls == []


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scale", "--experiment", str(tmp_path / "none.yaml"), "--run-dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"jpo: --experiment {tmp_path / 'none.yaml'}: no such file\n"


@pytest.mark.ray
def test_trainings_side_by_side_are_those_one_by_one(
    ray_cluster: object,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two at a time in processes of their own, and one after the other on Ray Train: the same weights."""
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))
    config = small_config(train=[JPO, JPO | {"name": "second", "seed": 3}], sample=None, evaluate=None)
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        run_stages(
            config, tmp_path / "one", ["items", "pairs", "judge", "sft", "reference"], Console(file=io.StringIO())
        )
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shown = io.StringIO()
    for name, at_once in (("one", 1), ("two", 2)):
        cluster = {"num_workers": 1, "cpus_per_worker": 1, "trainings_at_once": at_once}
        made = config.model_copy(update={"cluster": config.cluster.model_copy(update=cluster)})
        run_stages(made, tmp_path / name, ["train"], Console(file=shown, width=200))
    assert shown.getvalue().count("train/second") == 2
    for entry in ("jpo", "second"):
        one, two = (read_json(tmp_path / name / "train" / entry / "manifest.json") for name in ("one", "two"))
        assert one["files"]["adapter_model.safetensors"] == two["files"]["adapter_model.safetensors"]
    assert not list((tmp_path / "two" / ".building").iterdir())


@pytest.mark.ray
def test_no_room_for_so_many_at_once_is_one_line(ray_cluster: object, tmp_path: Path) -> None:
    config = ClusterConfig(cpus_per_worker=1, trainings_at_once=50)
    with pytest.raises(InputError, match="train: asks for 50 x 1 CPU"):
        run_trials(ray_cluster, config, print, ["jpo"], tmp_path, lambda: None)


@pytest.mark.ray
def test_interrupted_trials_end_at_once_and_are_not_taken_for_finished(ray_cluster: object, tmp_path: Path) -> None:
    def train(name: str) -> None:
        (tmp_path / name).touch()
        time.sleep(600)

    def show() -> None:
        if (tmp_path / "one").exists():
            raise KeyboardInterrupt

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
    config = ClusterConfig(cpus_per_worker=1, wait_s=30)
    with pytest.raises(KeyboardInterrupt):
        run_trials(ray_cluster, config, train, ["one"], tmp_path / "notes", show)
    await_resources(ray_cluster, config, "train", [{"CPU": 2}])  # in time: the trial is gone
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)] == before
    assert not (tmp_path / "notes").exists()


@pytest.mark.ray
def test_a_trial_whose_process_hangs_is_started_again(ray_cluster: object, tmp_path: Path) -> None:
    def train(name: str) -> None:
        with (tmp_path / name).open("a") as file:
            file.write("an attempt\n")
        if name == "hangs" and (tmp_path / name).read_text() == "an attempt\n":
            os.kill(os.getpid(), signal.SIGSTOP)

    config = ClusterConfig(cpus_per_worker=1, trainings_at_once=2, collective_timeout_s=5)
    run_trials(ray_cluster, config, train, ["hangs", "other"], tmp_path / "notes", lambda: None)
    assert (tmp_path / "hangs").read_text() == "an attempt\n" * 2
    assert (tmp_path / "other").read_text() == "an attempt\n"


@pytest.mark.ray
def test_what_is_wrong_with_one_training_is_told_once_the_others_have_ended(
    ray_cluster: object, tmp_path: Path
) -> None:
    def train(name: str) -> None:
        if name == "wrong":
            raise InputError("no decisive preferences to train on")
        (tmp_path / name).touch()

    config = ClusterConfig(cpus_per_worker=1, trainings_at_once=2)
    with pytest.raises(InputError, match="no decisive preferences"):
        run_trials(ray_cluster, config, train, ["wrong", "right", "other"], tmp_path / "notes", lambda: None)
    assert (tmp_path / "right").exists()
    assert (tmp_path / "other").exists()
    assert not (tmp_path / "notes").exists()
