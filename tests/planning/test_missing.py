"""What a run lacks on this machine: disk by hand, and what is said of the Hub."""

from pathlib import Path
from typing import Any

import pytest

from jpo_ray.config import RunConfig
from jpo_ray.config_file import parse_config
from jpo_ray.files import write_json
from jpo_ray.pipeline.plan import make_plan
from jpo_ray.planning.machine import Machine
from jpo_ray.planning.missing import (
    assumed_of_hub,
    disk_gib,
    free_disk,
    host_memory_gib,
    hub_gib,
    missing_machine,
    missing_models,
    missing_of_hub,
)
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
    """Checkpoints of 12 bytes a parameter: one, the one before it, one that is written; 2 bytes for the model."""
    assert disk_gib(config(), None) is None
    assert disk_gib(config(), BILLION) == 0.0  # adapters
    assert disk_gib(config(sft={}), BILLION) == 3 * 12 + 2
    assert disk_gib(config(sft={}, train=[{"use_peft": False}]), BILLION) == 2 * (12 + 2) + 2 * 12
    three = [{"name": f"jpo{number}", "use_peft": False} for number in range(3)]
    for at_once, going_on in ((1, 1), (2, 2), (4, 3)):  # SFT is over before them
        side_by_side = config(sft={}, train=three, cluster={"trainings_at_once": at_once})
        assert disk_gib(side_by_side, BILLION) == 4 * (12 + 2) + going_on * 2 * 12


def test_disk_of_rounds() -> None:
    """Adapters stay small under a fixed reference and are merged under a moved one; whole models are taken over."""
    fixed, moved = ({"count": 3, "reference": reference} for reference in ("fixed", "moved"))
    whole = [{"use_peft": False}]
    assert disk_gib(config(rounds=fixed), BILLION) == 0.0
    assert disk_gib(config(rounds=moved), BILLION) == 3 * 2
    assert disk_gib(config(rounds=fixed, train=whole), BILLION) == 3 * (12 + 2) + 2 * 12 + 3 * 2
    assert disk_gib(config(rounds=moved, train=whole), BILLION) == 3 * (12 + 2) + 2 * 12 + 3 * 2


def test_disk_of_a_base_merged_from_an_adapter(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": "somebody/base"})
    settings = config(model={"model_name_or_path": str(tmp_path), "dtype": "bfloat16"})
    assert disk_gib(settings, BILLION) == 2


def test_a_token_is_missing_where_terms_are_to_be_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Public models and data need none: that they are public is assumed, where anything is to come from the Hub."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    public, gated = config(), config(model={"model_name_or_path": "google/gemma-2b"})
    assert list(missing_of_hub(gated)) == ["HF_TOKEN is not set: the model's owner may ask to accept terms first"]
    assert list(missing_of_hub(public)) == list(assumed_of_hub(gated)) == []
    said = "what comes from the Hub is public: HF_TOKEN is not set"
    assert list(assumed_of_hub(public)) == [said]
    assert said in make_plan(public).assumed  # its data are on the Hub
    monkeypatch.setenv("HF_TOKEN", "some-token")
    assert list(missing_of_hub(gated)) == list(assumed_of_hub(public)) == []


def test_nothing_is_missing_of_a_run_on_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a key, a token or a network."""
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    source = [{"path": "sandbox", "limit": 20}]
    items, judge = {"train": source, "test": source}, {"annotator": "sandbox"}
    assert make_plan(config(items=items, judge=judge, sample={"engine": "transformers"})).missing == []


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


GIB = 2**30
MISTRAL, QWEN = 2 * 7_241_732_096 / GIB, 2 * 596_049_920 / GIB  # in 16 bits


def machine(**more: Any) -> Machine:
    facts = {"cores": 2, "memory_gib": 64.0, "free_disk_gib": 20.0, "free_hub_gib": 20.0, "one_disk": True}
    return Machine(0, "", None, **(facts | more))


def test_models_to_download_take_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each once, two bytes a parameter; a folder is downloaded from nowhere, and a size may be unknown."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    reward = "Skywork/Skywork-Reward-V2-Qwen3-0.6B"
    judges = [{"annotator": "reward_model", "model": reward}, {"annotator": "vllm", "model": "nobody/judge"}]
    settings = config(
        model={"model_name_or_path": "jointpreferences/mistral_7b_sft_helpful"},
        judge=judges[0] | {"also": [judges[1]]},
        pairs={"embedder": "sentence-transformers/all-MiniLM-L6-v2"},
    )
    found = missing_models(settings, [settings.judge, *settings.judge.also, settings.judge])
    assert [model.said for model in found] == [
        "model jointpreferences/mistral_7b_sft_helpful, about 14.5 GB in 16 bits",
        f"judge model {reward}, about 1.2 GB in 16 bits",
        "judge model nobody/judge",
        "embedder sentence-transformers/all-MiniLM-L6-v2",
    ]
    assert [model.gib for model in found] == [pytest.approx(MISTRAL), pytest.approx(QWEN), None, None]
    assert hub_gib(found) == pytest.approx(MISTRAL + QWEN)
    plan = make_plan(settings)
    assert plan.hub_gib == pytest.approx(MISTRAL + QWEN)
    assert "judges' memory and disk: nobody/judge left out, of a size that is not known here" in plan.assumed
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, '
        '"num_hidden_layers": 1, "vocab_size": 9}'
    )
    without_weights = config(model={"model_name_or_path": str(tmp_path)})
    assert hub_gib(missing_models(without_weights, [])) == 0


def test_disk_of_the_hubs_cache_is_compared() -> None:
    """20 GiB are free where the run and the cache are, or in either place."""
    assert list(free_disk(machine(), 10.0, 9.0, None)) == []
    assert list(free_disk(machine(), 10.0, 13.0, None)) == [
        "disk: 23 GiB for a run directory and for models in the Hub's cache, 20 are free here"
    ]
    assert list(free_disk(machine(one_disk=False), 10.0, 13.0, None)) == []
    assert list(free_disk(machine(one_disk=False, free_hub_gib=5.0), 30.0, 13.0, Path("run"))) == [
        "disk: 13 GiB of models for the Hub's cache (HF_HOME says where), 5 are free there",
        "disk: 30 GiB for run, 20 are free here",
    ]
    assert list(free_disk(machine(), None, 0.0, None)) == []


def test_host_memory_of_sharded_models_is_compared() -> None:
    """Four workers hold 4 bytes a parameter each while they load; of frozen weights 2."""
    cluster: dict[str, Any] = {"num_workers": 4}
    assert host_memory_gib(config(cluster=cluster, sft={}), BILLION) is None
    settings = config(cluster=cluster, sft={"sharding": "fsdp2"})
    assert host_memory_gib(settings, BILLION) == 4 * 4
    whole, adapter = ({"name": f"peft-{peft}", "sharding": "fsdp2", "use_peft": peft} for peft in (False, True))
    assert host_memory_gib(config(cluster=cluster, train=[adapter]), BILLION) == 4 * 2
    assert host_memory_gib(config(cluster=cluster, train=[adapter, whole]), BILLION) == 4 * 4
    side_by_side = cluster | {"trainings_at_once": 2}
    assert host_memory_gib(config(cluster=side_by_side, train=[adapter, whole]), BILLION) == 4 * (4 + 2)
    [said] = [line for line in missing_machine(settings, machine(memory_gib=12.0), [], 16.0) if "host" in line]
    assert said.startswith("host memory: 16 GiB of all workers while the sharded model is loaded, this machine has 12;")
    assert not [line for line in missing_machine(settings, machine(memory_gib=16.0), [], 16.0) if "host" in line]
