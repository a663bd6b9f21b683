"""Bad input that only a stage can find: one line, exit code 2, and nothing half-made."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jpo_ray.cli import main
from jpo_ray.sandbox import BASE_MODEL
from pipeline.inline import Cluster, small_config


@pytest.fixture
def jpo(run_dir: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `jpo` with overrides on a finished run; returns the line it ends with, and what the cluster was asked."""
    assert cluster.calls == []
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_config().model_dump(mode="json")))

    def run(stage: str, *overrides: str) -> tuple[str, list[str]]:
        assert main([stage, "--config", str(path), "--run-dir", str(run_dir), *overrides]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert [path for path in (run_dir / ".building").rglob("*") if path.is_file()] == []
        return error, cluster.calls

    return run


def test_a_similarity_band_that_is_too_narrow(jpo: Any) -> None:
    error, _ = jpo("run", "pairs.joint.min_similarity=0.97")
    assert "pairs.joint: the similarity band [0.97, 1] leaves " in error
    assert "pairs, the budget asks for 48; widen min_similarity/max_similarity or lower pairs.joint.budget" in error


def test_a_validation_split_too_small_for_the_band_names_its_own_budget(jpo: Any) -> None:
    error, _ = jpo("run", "pairs.joint.validation_budget=1000")
    assert "12 items make 66 pairs, the budget asks for 1000" in error
    assert "lower pairs.joint.validation_budget" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=2000"], "48 items make 1128 pairs, the budget asks for 2000"),
        (["max_per_item=1", "budget=30"], "max_per_item: 48 items in at most 1 pairs each make at most 24 pairs, the"),
        (
            ["min_per_item=3", "budget=50"],
            "min_per_item: 48 items in at least 3 pairs each take at least 72 pairs, the",
        ),
        (["min_per_item=5", "max_per_item=4"], "min_per_item 5 is above max_per_item 4"),
        (["connected=true", "budget=40"], "connected: it takes 47 pairs to connect 48 items, the budget gives 40"),
        (["connected=true", "group_size=12"], "connected: items of different groups are never compared"),
        (["connected=true", "min_similarity=0.6", "max_similarity=0.62", "budget=47"], "pairs.joint"),
    ],
    ids=["budget", "max", "min", "min above max", "connected", "groups", "disconnected"],
)
def test_limits_that_contradict_each_other(jpo: Any, overrides: list[str], message: str) -> None:
    error, _ = jpo("run", *(f"pairs.joint.{override}" for override in overrides))
    assert message in error


def test_a_max_length_shorter_than_an_instruction(jpo: Any) -> None:
    error, calls = jpo("run", "model.max_length=12")
    assert "model.max_length=12 is shorter than an instruction of " in error
    assert "raise it to at least" in error
    assert calls == []  # before anything is embedded, paired or judged


def test_weights_that_are_a_pickle_are_found_before_any_stage(jpo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(BASE_MODEL / "config.json", folder)
    torch.save({}, folder / "pytorch_model.bin")
    error, calls = jpo("run", f"model.model_name_or_path={folder}", "seed=5")
    assert f"model.model_name_or_path: {folder}: no model.safetensors; pickled weights are not loaded" in error
    assert calls == []


def test_an_engine_that_is_not_installed_is_found_before_any_stage(jpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    error, calls = jpo("run", "sample.engine=vllm", "seed=5")
    assert "sample.engine: vllm is not installed" in error
    assert calls == []


def test_samples_longer_than_the_model_takes(jpo: Any) -> None:
    error, calls = jpo("run", "sample.max_new_tokens=500")
    assert "sample.max_new_tokens=500: the model takes 512 tokens and the longest prompt has " in error
    assert calls == []


def test_proxy_pairs_without_labels(jpo: Any) -> None:
    error, _ = jpo("run", "pairs.joint.strategy=proxy", "judge.annotator=labels", "evaluate=null")
    assert "pairs.joint.strategy: proxy needs labelled comparisons in items.train; there are none" in error
