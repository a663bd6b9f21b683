"""What a run lacks on this machine: disk by hand, and what is said of the Hub."""

from pathlib import Path
from typing import Any

import pytest

from jpo_ray.config import RunConfig
from jpo_ray.config_file import parse_config
from jpo_ray.files import write_json
from jpo_ray.pipeline.plan import make_plan
from jpo_ray.planning.missing import disk_gib, hub_notes
from jpo_ray.planning.shapes import ModelShapes

BILLION = ModelShapes({"weight": (2**15, 2**15)}, {}, "made up")  # one GiB for each byte of a parameter


def config(**sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "items": {"train": [{"path": "somebody/train"}]},
        "model": {"model_name_or_path": "sandbox", "dtype": "bfloat16"},
        "judge": {"annotator": "openai"},
        "sft": None,
        "sample": None,
        "evaluate": None,
    }
    return parse_config(values | sections, "test")


def test_disk_by_hand() -> None:
    """A checkpoint of 12 bytes a parameter and one more while it is written, 2 bytes for the model."""
    assert disk_gib(config(), None) is None
    assert disk_gib(config(), BILLION) == 0.0  # adapters
    assert disk_gib(config(sft={}), BILLION) == 12 + 12 + 2
    assert disk_gib(config(sft={}, train=[{"use_peft": False}]), BILLION) == 2 * (12 + 2) + 12


def test_disk_of_rounds() -> None:
    """Adapters stay small under a fixed reference and are merged under a moved one; whole models are taken over."""
    fixed, moved = ({"count": 3, "reference": reference} for reference in ("fixed", "moved"))
    whole = [{"use_peft": False}]
    assert disk_gib(config(rounds=fixed), BILLION) == 0.0
    assert disk_gib(config(rounds=moved), BILLION) == 3 * 2
    assert disk_gib(config(rounds=fixed, train=whole), BILLION) == 3 * (12 + 2) + 12 + 3 * 2
    assert disk_gib(config(rounds=moved, train=whole), BILLION) == 3 * (12 + 2) + 12 + 3 * 2


def test_disk_of_a_base_merged_from_an_adapter(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "somebody/base"})
    settings = config(model={"model_name_or_path": str(tmp_path), "dtype": "bfloat16"})
    assert disk_gib(settings, BILLION) == 2


def test_a_token_is_perhaps_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "HF_TOKEN is not set; perhaps the Hub asks for it" in hub_notes(config(), needs_hub=True)
    gated = config(model={"model_name_or_path": "google/gemma-2b"})
    assert any("may ask to accept terms" in line for line in hub_notes(gated, needs_hub=True))


def test_what_is_taken_for_granted_is_said_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = "jointpreferences/mistral_7b_sft_helpful"
    plan = make_plan(config(model={"model_name_or_path": name}, rounds={"count": 1}))
    assert plan.model == f"{name} (taken to be as large as mistralai/Mistral-7B-v0.1)"
    assert any(line.startswith("samples: as long as the data's responses") for line in plan.assumed)
    assert "the time that judging takes is not estimated" in plan.assumed


def test_files_at_an_address_are_named_by_it() -> None:
    """`json` is the reader's name, and no part of where the file is."""
    address = "hf://datasets/somebody/some/file.json"
    plan = make_plan(config(items={"train": [{"path": "json", "data_files": address}]}))
    assert f"data of items.train: {address}" in plan.missing
