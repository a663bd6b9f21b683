"""Runs that start from an SFT adapter: the reference is the adapter on its base, never the bare base."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from jpo_ray import records
from jpo_ray.data.tokens import tokenize
from jpo_ray.engine.adapters import load_adapter
from jpo_ray.engine.jobs import layout_of
from jpo_ray.engine.model import load_model, load_tokenizer
from jpo_ray.engine.scoring import make_scorer
from jpo_ray.engine.step import score_all
from jpo_ray.errors import InputError
from jpo_ray.files import read_json, write_json
from jpo_ray.sandbox import BASE_MODEL
from pipeline.inline import DPO, JPO, Cluster, run, small_config


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter as peft and TRL save one, away from zero."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(Path(BASE_MODEL), dtype="float32"), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "sft-lora")
    return tmp_path / "sft-lora"


def config_from(adapter: Path, **sections: Any) -> Any:
    model = {"model_name_or_path": str(adapter), "max_length": 256}
    return small_config(**({"model": model, "train": [JPO], "sft": None} | sections))


def test_the_reference_is_the_adapter_on_its_base(adapter: Path, tmp_path: Path, cluster: Cluster) -> None:
    """And the policy starts there: training would refuse a reference that is not the policy before its first step."""
    config, run_dir = config_from(adapter), tmp_path / "run"
    shown = run(config, run_dir)
    assert f"{adapter} is an adapter: what starts from it, and the reference, is it merged into {BASE_MODEL}" in shown
    table = records.read_table(run_dir / "reference" / "reference.parquet", records.REFERENCE).to_pylist()
    found = {row["item_id"]: (row["instruction_logprob"], row["response_logprob"]) for row in table}
    scored = f"score {len(found)}"
    assert cluster.calls == ["embed", "tiles", scored, "train-jpo", "sample 12 with transformers"]
    items = records.read_table(run_dir / "items" / "items.parquet", records.ITEMS).to_pylist()
    items = [row for row in items if row["item_id"] in found]
    texts = ([row["instruction"] for row in items], [row["response"] for row in items])
    tokens = tokenize(load_tokenizer(Path(BASE_MODEL)), layout_of(config.model), *texts)
    stacked = load_adapter(adapter, Path(BASE_MODEL), dtype="float32")
    bare = load_model(Path(BASE_MODEL), dtype="float32")
    scores, of_base = (
        score_all(make_scorer(model), tokens, np.arange(len(items)), max_tokens=4096).numpy()
        for model in (stacked, bare)
    )
    reference = np.array([found[row["item_id"]] for row in items])
    assert np.abs(reference - scores).max() < 2e-3
    assert np.abs(reference - of_base).max() > 1
    trained = read_json(run_dir / "train" / "jpo" / "adapter_config.json")
    assert trained["base_model_name_or_path"] == str((run_dir / "base").resolve())


def test_a_run_stands_until_its_adapter_changes(adapter: Path, tmp_path: Path, cluster: Cluster) -> None:
    config, run_dir = config_from(adapter, sample=None, evaluate=None), tmp_path / "run"
    run(config, run_dir)
    cluster.calls.clear()
    assert "base stands already" in run(config, run_dir)
    assert cluster.calls == []
    write_json(adapter / "adapter_config.json", read_json(adapter / "adapter_config.json") | {"lora_alpha": 3})
    run(config, run_dir)
    counts = read_json(run_dir / "reference" / "manifest.json")["counts"]
    assert cluster.calls == [f"score {counts['items']}", "train-jpo"]


def test_an_adapter_whose_base_is_gone_stops_the_run_at_once(adapter: Path, tmp_path: Path, cluster: Cluster) -> None:
    write_json(
        adapter / "adapter_config.json",
        read_json(adapter / "adapter_config.json") | {"base_model_name_or_path": "/nowhere/base"},
    )
    with pytest.raises(InputError, match=r"^model.model_name_or_path: .*: /nowhere/base: no such"):
        run(config_from(adapter), tmp_path / "run")
    assert cluster.calls == []


def test_training_goes_on_from_an_adapter_and_the_reference_stays(run_dir: Path, cluster: Cluster) -> None:
    """The first step starts where `jpo` ended: its margins are not those of fresh adapters, which are zero."""
    jpo = run_dir / "train" / "jpo"
    more = JPO | {"name": "more", "continue_from": str(jpo), "save_steps": 1}
    run(small_config(train=[JPO, DPO, more]), run_dir, ["train"])
    assert cluster.calls == ["train-more"]
    first = {
        name: read_json(run_dir / "train" / name / "trainer_state.json")["log_history"][0]["rewards/margins"]
        for name in ("jpo", "more")
    }
    assert abs(first["jpo"]) < 1e-3 < abs(first["more"])
    with pytest.raises(InputError, match=r"train.more.continue_from: .*train/jpo has rank 8; set lora_r: 8"):
        run(small_config(train=[JPO, DPO, more | {"lora_r": 4}]), run_dir, ["train"])
    with pytest.raises(InputError, match=r"train.more.continue_from: .* is no adapter's folder"):
        run(small_config(train=[JPO, DPO, more | {"continue_from": "/nowhere"}]), run_dir, ["train"])
