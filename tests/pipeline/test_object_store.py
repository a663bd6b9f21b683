"""Runs whose directory is on a real S3 server: the same results, gone on with from any machine."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from s3 import S3
from safetensors.numpy import load_file

from jpo_ray.cli import main
from jpo_ray.files import read_json
from jpo_ray.pipeline import STAGES, item_stage, run_stages
from jpo_ray.pipeline.annotate import comparisons_to_annotate
from jpo_ray.runs import RunDir
from jpo_ray.store import Store
from pipeline.conftest import Finished
from pipeline.inline import Cluster, run, small_config

ARTIFACTS = [
    "items", "embeddings", "pairs", "judge", "sft", "reference", "train/jpo", "train/dpo", "sample", "evaluate",
]  # fmt: skip
CONFIG = """
items: {train: [{path: sandbox, limit: 10}]}
model: {model_name_or_path: sandbox}
judge: {annotator: sandbox}
train: [{name: jpo}]
sample: null
evaluate: null
"""
VARYING = ("adapter_config.json", "base_model.json", "trainer_state.json", "files.json")  # paths and times are in them


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "here"))


@pytest.fixture
def copied(finished: Finished, s3_server: S3, cluster: Cluster) -> str:  # noqa: ARG001
    """The finished run, on the server."""
    uri = s3_server.uri()
    console = Console(file=io.StringIO())
    run_stages(small_config(), uri, list(STAGES), console, others=[finished.run_dir])
    return uri


def test_a_run_there_is_that_of_a_folder_and_another_machine_goes_on_with_it(
    finished: Finished, s3_server: S3, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training's machine is lost after 5 steps; the next one goes on from the checkpoint of step 4."""
    uri = s3_server.uri()
    run(small_config(), uri, ["items", "pairs", "judge", "sft", "reference"])
    cluster.dies_at_step = 5
    with pytest.raises(KeyboardInterrupt):
        run(small_config(), uri, ["train"])
    left = Store(uri).names(".building")
    assert {name.split("/")[1] for name in left} == {"checkpoint-2", "checkpoint-4"}
    before = list(cluster.calls)
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "there"))
    shown = run(small_config(), uri)
    assert shown.count("stands already") == 6
    assert cluster.calls == [
        *before,
        "train-jpo",
        "train-dpo",
        *finished.calls[finished.calls.index("train-dpo") + 1 :],
    ]
    there, here = RunDir(uri), RunDir(finished.run_dir)
    assert there.root.is_relative_to(tmp_path / "there")
    for artifact in ARTIFACTS:
        ours, theirs = there.require(artifact, artifact), here.require(artifact, artifact)
        assert ours.fingerprint == theirs.fingerprint
        assert hashes(ours.files) == hashes(theirs.files)
    resumed, expected = (load_file(each.path("train/jpo") / "adapter_model.safetensors") for each in (there, here))
    assert all(np.array_equal(resumed[name], expected[name]) for name in expected)
    names = Store(uri).names("")
    assert [name for name in names if name.startswith((".building", "lease"))] == []
    assert run(small_config(), uri).count("stands already") == len(ARTIFACTS) + 1


def hashes(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if not name.endswith(VARYING)}


def test_a_damaged_checkpoint_there_is_not_gone_on_with(
    finished: Finished, copied: str, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(copied)
    store.delete("train/jpo")
    cluster.dies_at_step = 5
    with pytest.raises(KeyboardInterrupt):
        run(small_config(), copied, ["train"])
    name = next(name for name in store.names(".building") if name.endswith("optimizer.safetensors"))
    content = store.read(f".building/{name}") or b""
    store.write(f".building/{name}", content[:-1000])
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "there"))
    run(small_config(), copied, ["train"])
    there, here = (
        load_file(RunDir(where).path("train/jpo") / "adapter_model.safetensors") for where in (copied, finished.run_dir)
    )
    assert all(np.array_equal(there[name], here[name]) for name in here)


def test_commands_that_read_a_run_read_it_from_there(
    finished: Finished, copied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "there"))
    out = str(tmp_path / "out")
    assert main(["report", "--compare", copied, str(finished.run_dir), "--out", out]) == 0
    rates = read_json(tmp_path / "out" / "comparison.json")["models"]
    assert all(one == other for one, other in rates.values())
    assert main(["analyze", "--run-dir", copied, "--out", out]) == 0
    assert main(["alpaca-eval", "export", "--run-dir", copied, "--out", out]) == 0
    assert comparisons_to_annotate(None, copied, 5) == comparisons_to_annotate(None, finished.run_dir, 5)
    capsys.readouterr()
    assert main(["analyze", "--run-dir", copied]) == 2
    assert "need --out" in capsys.readouterr().err
    assert main(["scale", "--experiment", "x.yaml", "--run-dir", copied]) == 2
    assert "`jpo scale` needs a folder" in capsys.readouterr().err


def test_what_is_wrong_with_an_address_is_one_line_and_exit_code_2(
    s3_server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jpo_ray.store.ATTEMPTS", 1)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    closed = "s3://runs/x?endpoint_override=127.0.0.1:1&scheme=http"
    for uri, said in (
        (s3_server.uri("nowhere", "x"), "s3://nowhere/x: there is no such bucket"),
        (closed, "s3://runs/x: no answer from 127.0.0.1:1"),
        ("s3://me:hush@runs/x", "credentials do not belong in a URI"),
        ("s4://runs/x", "Unrecognized filesystem type"),
    ):
        assert main(["items", "--config", str(config), "--run-dir", uri]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
        assert "hush" not in line


def test_a_store_that_goes_away_at_work_is_one_line_and_exit_code_1(
    s3_server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The items stand, and the next command goes on."""
    monkeypatch.setattr("jpo_ray.store.REQUEST_S", 1.0)
    monkeypatch.setattr("jpo_ray.store.ATTEMPTS", 1)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    uri = s3_server.uri()
    arguments = ["--config", str(config), "--run-dir", uri]
    assert main(["items", *arguments]) == 0
    before = Store(uri).names("")
    build_items = item_stage.build_items

    def then_gone(*arguments: Any) -> Any:
        tables = build_items(*arguments)
        s3_server.freeze()
        return tables

    monkeypatch.setattr(item_stage, "build_items", then_gone)
    try:
        assert main(["items", *arguments, "seed=1"]) == 1
    finally:
        s3_server.thaw()
    said = capsys.readouterr().err
    assert said.startswith("jpo: failed: StoreError: s3://runs/")
    assert "no answer from 127.0.0.1" in said
    assert [name for name in Store(uri).names("") if not name.startswith("lease/")] == before


@pytest.mark.usefixtures("cluster")
def test_a_cache_there_serves_every_machine(s3_server: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPO_CACHE", s3_server.uri())
    for machine in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        run(small_config(), tmp_path / f"run-{machine}", ["items", "pairs", "judge", "sft", "reference"])
    counts = [RunDir(tmp_path / f"run-{machine}").require("reference", "").counts for machine in ("one", "two")]
    assert [count["scored now"] for count in counts] == [counts[0]["items"], 0]
