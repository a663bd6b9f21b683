"""Real text: the authors' Anthropic-Helpful files through `configs/helpful_tiny.yaml`."""

import os
from pathlib import Path
from typing import Any

import pytest

from jpo_ray import records
from jpo_ray.cli import main
from jpo_ray.config import RunConfig
from jpo_ray.config_file import load_config
from jpo_ray.data.tokens import tokenize
from jpo_ray.engine.jobs import layout_of
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.files import read_json
from jpo_ray.sandbox.model import make_tiny_model
from pipeline.inline import Cluster, run

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs" / "helpful_tiny.yaml"
FOLDER = Path(os.environ.get("JPO_REAL_DATA", REPOSITORY.parent / "shared" / "data")) / "dove" / "anthropic_helpful"
FILES = {
    "items.train.0.path": "val_conditional_pref.jsonl",
    "items.train.1.path": "val_sft.jsonl",
    "items.test.0.path": "test.jsonl",
}


@pytest.fixture
def overrides() -> list[str]:
    if not FOLDER.is_dir():
        pytest.skip(f"no real data at {FOLDER}; set JPO_REAL_DATA to a folder that holds dove/anthropic_helpful")
    return [f"{key}={FOLDER / name}" for key, name in FILES.items()]


@pytest.fixture
def config(overrides: list[str]) -> RunConfig:
    return load_config(CONFIG, overrides)


def test_the_config_names_the_files_beside_the_repository() -> None:
    config = load_config(CONFIG)
    found = [Path(source.path) for source in (*config.items.train, *config.items.test)]
    assert found == [Path("../shared/data/dove/anthropic_helpful") / name for name in FILES.values()]


def test_real_text_becomes_items_pairs_and_labels(config: RunConfig, tmp_path: Path, cluster: Cluster) -> None:
    """All of the data, without a model: 363 conditional comparisons and as many proxy ones, all of them decided."""
    run(config, tmp_path / "run", ["items", "pairs", "judge"])
    assert cluster.calls == ["embed", "tiles"]
    pairs = read_json(tmp_path / "run" / "pairs" / "manifest.json")["counts"]
    assert pairs == {"train conditional": 363, "train joint": 363}
    judged = read_json(tmp_path / "run" / "judge" / "manifest.json")["counts"]
    assert (judged["judgments"], judged["decisive"], judged["invalid"], judged["tie"]) == (726, 726, 0, 0)
    labels = records.read_table(tmp_path / "run" / "items" / "labels.parquet", records.LABELS).to_pylist()
    winners = {label["item_a"] for label in labels}  # `i_chosen` stands first in every row
    chosen = records.read_table(tmp_path / "run" / "judge" / "preferences.parquet", records.PREFERENCES)
    assert set(chosen["chosen"].to_pylist()) <= winners
    assert not set(chosen["rejected"].to_pylist()) & winners


def test_odd_characters_and_long_texts_pass_the_tokenizer(config: RunConfig, tmp_path: Path, cluster: Cluster) -> None:
    run(config, tmp_path / "run", ["items"])
    made = tmp_path / "base"
    made.mkdir()
    table = records.read_table(tmp_path / "run" / "items" / "items.parquet", records.ITEMS)
    texts = list(dict.fromkeys([*table["instruction"].to_pylist(), *table["response"].to_pylist()]))
    make_tiny_model(texts, made, seed=0)
    tokenizer = load_tokenizer(made)
    odd = [text for text in texts if not text.isascii()]
    assert len(odd) > 500
    for text in odd:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    rows = table.to_pylist()
    tokens = tokenize(
        tokenizer, layout_of(config.model), [row["instruction"] for row in rows], [row["response"] for row in rows]
    )
    assert tokens.lengths.max() == config.model.max_length == 256
    assert 40 < tokens.truncated < 140  # 97 of 1,363 when this was written
    assert (tokens.response_tokens >= 1).all()
    assert cluster.calls == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.vllm
def test_real_text_goes_all_the_way(
    ray_cluster: Any, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    assert ray_cluster.is_initialized()
    folder = tmp_path / "run"
    assert main(["run", "--config", str(CONFIG), "--run-dir", str(folder), *overrides]) == 0
    shown = capsys.readouterr().out
    assert "No win rates: `evaluate` is off" in shown
    counts = {
        name: read_json(folder / name / "manifest.json")["counts"]
        for name in ("sft", "reference", "train/jpo", "train/dpo", "train/kto", "sample")
    }
    assert counts["sft"]["steps"] == 32
    assert [counts[f"train/{name}"]["steps"] for name in ("jpo", "dpo", "kto")] == [46, 24, 24]
    assert counts["train/jpo"]["validation_comparisons"] == 0
    assert "held-out loss" not in counts["train/jpo"]
    assert 40 < counts["reference"]["truncated"] < 140
    assert f"truncated {counts['reference']['truncated']}" in shown
    assert (counts["sample"]["samples"], counts["sample"]["engine"]) == (64, "vllm")
    pairs = records.read_table(folder / "pairs" / "pairs.parquet", records.PAIRS).to_pylist()
    joint = [pair["similarity"] for pair in pairs if pair["protocol"] == "joint"]
    assert 0.2 <= min(joint) <= max(joint) <= 0.9
    page = (folder / "report" / "index.html").read_text()
    assert "not evaluated" in page
    assert not (folder / "evaluate").exists()
