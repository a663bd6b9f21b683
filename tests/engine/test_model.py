"""Models on disk: hashes of weights, loading, LoRA, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.tiny import config, make_llama
from jpo_ray.config import BaseModelConfig
from jpo_ray.engine import model as model_module
from jpo_ray.engine.model import (
    add_lora,
    load_model,
    load_policy,
    load_tokenizer,
    model_hash,
    resolve_model,
    weights_hash,
)
from jpo_ray.errors import InputError


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may change."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_alone_and_broken_weights_are_no_model(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"model.safetensors: cannot be read"):
        resolve_model(str(copy))
    weights.rename(copy / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"no model.safetensors; .* an adapter alone is not a model"):
        resolve_model(str(copy))
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(InputError, match=r"no model-00001-of-00002.safetensors"):
        resolve_model(str(copy))


def test_a_model_without_a_tokenizer_is_refused_in_one_line(copy: Path) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"holds no tokenizer that can be loaded") as caught:
        load_tokenizer(copy)
    assert "\n" not in str(caught.value)


def test_hash_is_of_the_weights_not_the_place(llama: Path, copy: Path, tmp_path: Path) -> None:
    assert weights_hash(copy) == weights_hash(llama)
    assert weights_hash(make_llama(tmp_path / "seed1", seed=1)) != weights_hash(llama)


def test_one_changed_weight_changes_the_hash(llama: Path, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert weights_hash(copy) != weights_hash(llama)


def test_hash_ignores_which_transformers_wrote_it_but_not_the_architecture(llama: Path, copy: Path) -> None:
    edit_json(copy / "config.json", transformers_version="1.2.3", _name_or_path="/elsewhere")
    assert weights_hash(copy) == weights_hash(llama)
    edit_json(copy / "config.json", rms_norm_eps=1e-3)
    assert weights_hash(copy) != weights_hash(llama)


def test_an_adapter_is_part_of_the_hash(llama: Path, copy: Path) -> None:
    add_lora(load_model(copy, dtype="float32"), config(), seed=0).save_pretrained(copy)
    with_adapter = weights_hash(copy)
    assert with_adapter != weights_hash(llama)
    edit_json(copy / "adapter_config.json", lora_alpha=99)
    assert weights_hash(copy) != with_adapter


def test_hashes_of_files_are_remembered(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call reads no weights; a file that changes is read again, and only that one."""
    read: list[str] = []
    hash_file = model_module.hash_file
    monkeypatch.setattr(model_module, "hash_file", lambda path: (read.append(path.name), hash_file(path))[1])
    first = weights_hash(copy, tmp_path / "cache")
    assert "model.safetensors" in read
    read.clear()
    assert weights_hash(copy, tmp_path / "cache") == first
    assert read == []
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] = 7.0
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert weights_hash(copy, tmp_path / "cache") != first
    assert read == ["model.safetensors"]


def test_lora_starts_from_its_seed_alone(llama: Path) -> None:
    """Whatever was drawn before; another seed starts elsewhere; B is zero, so the policy is the reference."""
    first, again, other = ({} for _ in range(3))
    for found, seed in ((first, 1), (again, 1), (other, 2)):
        torch.rand(len(found) + seed)
        policy = load_policy(llama, BaseModelConfig(model_name_or_path=str(llama)), config(), seed=seed)
        found.update({name: p.detach().clone() for name, p in policy.named_parameters() if p.requires_grad})
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)
    assert all(not value.any() for name, value in first.items() if "lora_B" in name)
    assert len(first) == 2 * 7 * 2  # A and B of seven projections in two layers, the head left alone


def test_only_what_is_trained_needs_gradients(llama: Path) -> None:
    base = BaseModelConfig(model_name_or_path=str(llama), dtype="bfloat16")
    lora = load_policy(llama, base, config(), seed=0)
    assert {p.dtype for p in lora.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for name, p in lora.named_parameters() if "lora" not in name} == {torch.bfloat16}
    full = load_policy(llama, base, config(use_peft=False), seed=0)
    assert {(p.dtype, p.requires_grad) for p in full.parameters()} == {(torch.float32, True)}


def test_unknown_lora_targets_are_refused(llama: Path) -> None:
    base = BaseModelConfig(model_name_or_path=str(llama))
    with pytest.raises(InputError, match=r"^train\.jpo\.lora_target_modules: .*c_attn"):
        load_policy(llama, base, config(lora_target_modules=["c_attn"]), seed=0)


def test_models_that_cannot_be_had_are_refused_by_name(llama: Path, copy: Path, tmp_path: Path) -> None:
    assert resolve_model(str(llama)) == llama
    (tmp_path / "empty").mkdir()
    for name, reason in (
        (str(tmp_path / "none"), "no such folder"),
        ("no-slash", "no such folder"),
        ("./a/b/c", "no such folder"),
        (str(tmp_path / "empty"), "holds no config.json; name the folder of a model"),
    ):
        with pytest.raises(InputError, match=f"^model.model_name_or_path: .*{reason}"):
            resolve_model(name)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no model.safetensors; pickled weights are not loaded, convert them"):
        resolve_model(str(copy))


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError) as caught:
        resolve_model("some-one/some-model")
    assert str(caught.value).endswith("neither a folder nor to be had from the Hugging Face Hub (no route to host)")


def test_a_tokenizer_without_eos_is_refused(llama: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, tmp_path / name)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    with pytest.raises(InputError, match="the tokenizer has no EOS token"):
        load_tokenizer(tmp_path)


def test_the_model_hash_knows_the_tokenizer(llama: Path, copy: Path) -> None:
    assert model_hash(llama) == model_hash(copy)
    rules = json.loads((copy / "tokenizer.json").read_text())
    first, second = list(rules["model"]["vocab"])[-2:]
    vocab = rules["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (copy / "tokenizer.json").write_text(json.dumps(rules))
    assert weights_hash(llama) == weights_hash(copy)
    assert model_hash(llama) != model_hash(copy)
