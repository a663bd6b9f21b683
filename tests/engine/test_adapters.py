"""Adapters over bases: their own, its copies, and others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from engine.tiny import config, make_llama, policy_scorer, save
from jpo_ray.engine.adapters import base_of, check_base, load_adapter, record_base
from jpo_ray.engine.model import load_model, weights_hash
from jpo_ray.errors import InputError
from jpo_ray.files import read_json, write_json


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of the same shapes with other weights."""
    return make_llama(tmp_path_factory.mktemp("other"), seed=1)


def saved(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter as peft (and TRL with it) saves one."""
    lora = LoraConfig(r=4, target_modules=options.pop("target_modules", "all-linear"), **options)
    model = load_model(base, dtype="float32")
    get_peft_model(model, lora).save_pretrained(folder)
    assert not (folder / "base_model.json").exists()
    return folder


def renamed(adapter: Path, base: str | None) -> Path:
    content = read_json(adapter / "adapter_config.json") | {"base_model_name_or_path": base}
    write_json(adapter / "adapter_config.json", content)
    return adapter


def refused(adapter: Path, base: Path) -> str:
    with pytest.raises(InputError) as caught:
        check_base(adapter, base, "here")
    message = str(caught.value)
    assert message.startswith("here: ")
    assert "\n" not in message
    assert str(adapter) in message
    assert str(base) in message
    return message


def test_an_adapter_fits_its_own_base_and_a_copy_of_it(llama: Path, tmp_path: Path) -> None:
    adapter = saved(llama, tmp_path / "adapter")
    check_base(adapter, llama, "here")
    assert base_of(adapter, "here") == llama
    check_base(adapter, shutil.copytree(llama, tmp_path / "copy"), "here")


def test_the_same_shapes_with_other_weights_are_another_base(llama: Path, other: Path, tmp_path: Path) -> None:
    adapter = saved(llama, tmp_path / "adapter")
    assert f"was trained on {llama}, and not on {other}; where both are the same model, write" in refused(
        adapter, other
    )


def test_what_a_run_records_outlives_the_folder(llama: Path, other: Path, tmp_path: Path) -> None:
    """The run was moved: the name leads nowhere, or to another model, and the weights decide."""
    adapter = renamed(saved(llama, tmp_path / "adapter"), str(other))
    record_base(adapter, llama, weights_hash(llama), load_in_4bit=False)
    assert read_json(adapter / "base_model.json")["model"] == str(llama)
    check_base(adapter, llama, "here")
    check_base(adapter, shutil.copytree(llama, tmp_path / "moved"), "here")
    assert f"was trained on {llama}, and not on {other}; use the base" in refused(adapter, other)


def test_a_base_that_was_trained_again_in_its_place_is_another(other: Path, tmp_path: Path) -> None:
    base = shutil.copytree(other, tmp_path / "sft")
    adapter = saved(base, tmp_path / "adapter")
    record_base(adapter, base, weights_hash(base), load_in_4bit=False)
    make_llama(base, seed=2)
    assert f"was trained on {base}, as it was then, and its weights are others now" in refused(adapter, base)
    with pytest.raises(InputError, match="its weights are others now"):
        base_of(adapter, "here")


def test_a_base_that_is_not_here_is_taken_by_its_name(llama: Path, tmp_path: Path) -> None:
    """As TRL leaves it: an id on the Hub. Whoever knows that the folder holds it may say so."""
    adapter = renamed(saved(llama, tmp_path / "adapter"), "meta-llama/Llama-3.2-1B")
    assert "was trained on meta-llama/Llama-3.2-1B, and not on" in refused(adapter, llama)
    check_base(renamed(adapter, str(llama)), llama, "here")
    check_base(renamed(adapter, None), llama, "here")  # no name: the shapes alone
    with pytest.raises(InputError, match="names no base model"):
        base_of(adapter, "here")


def test_shapes_that_do_not_fit_are_counted_and_the_first_is_named(llama: Path, gpt2: Path, tmp_path: Path) -> None:
    """Two layers of seven linear modules: the narrow one's q, k and v have 64 inputs, the wide one's 96."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    wide = save(LlamaForCausalLM, LlamaConfig(vocab_size=420, num_hidden_layers=2, **sizes), tmp_path / "wide", 0)
    adapter = renamed(saved(wide, tmp_path / "adapter", target_modules=["q_proj"]), None)
    said = refused(adapter, llama)
    assert "does not fit" in said
    assert "model.layers.0.self_attn.q_proj has 64 inputs there and 96 in the adapter (and 3 more)" in said
    said = refused(adapter, gpt2)
    assert "it has no model.layers.0.self_attn.q_proj (and 3 more)" in said


def test_a_config_of_another_rank_than_the_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    """vLLM takes such an adapter without a word."""
    adapter = saved(llama, tmp_path / "adapter", target_modules=["q_proj"])
    write_json(adapter / "adapter_config.json", read_json(adapter / "adapter_config.json") | {"r": 2})
    assert "model.layers.0.self_attn.q_proj has rank 4 in its weights and 2 in its config (and 3 more)" in refused(
        adapter, llama
    )


def test_transposed_layers_and_whole_modules_are_read_too(gpt2: Path, tmp_path: Path) -> None:
    adapter = saved(gpt2, tmp_path / "gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    check_base(adapter, gpt2, "here")
    base = make_llama(tmp_path / "untied", tied=False)
    headed = saved(base, tmp_path / "headed", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    check_base(headed, base, "here")
    larger = json.loads((base / "config.json").read_text()) | {"vocab_size": 500}
    grown = shutil.copytree(base, tmp_path / "grown")
    (grown / "config.json").write_text(json.dumps(larger))
    said = refused(renamed(headed, None), grown)
    assert "model.embed_tokens.weight is 500 x 64 there and 420 x 64 in the adapter" in said


def test_what_is_no_adapter(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no adapter's folder"):
        check_base(tmp_path, llama, "here")
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": str(llama)})
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"holds no adapter_model\.safetensors; pickled adapters are not loaded"):
        check_base(tmp_path, llama, "here")


def test_an_adapter_is_loaded_on_the_base_that_is_given(llama: Path, tmp_path: Path) -> None:
    """Whatever its config names: the caller has checked."""
    model = policy_scorer(llama, config()).model
    model.save_pretrained(tmp_path)
    renamed(tmp_path, "/nowhere")
    ids = torch.arange(1, 20).unsqueeze(0)
    with torch.no_grad():
        found = load_adapter(tmp_path, llama, dtype="float32")(input_ids=ids).logits
        assert torch.equal(found, model.eval()(input_ids=ids).logits)
