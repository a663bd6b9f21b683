"""Parameters counted without weights."""

from pathlib import Path
from typing import Any

import pytest

from jpo_ray.planning.shapes import KNOWN, ModelShapes, base_name, model_shapes, shapes_of_config, weight_files
from jpo_ray.planning.tokenizing import plain_tokenizer
from jpo_ray.sandbox import BASE_MODEL


def shapes(name: str) -> ModelShapes:
    found = model_shapes(name)
    assert isinstance(found, ModelShapes)
    return found


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen3-0.6B-Base", 596_049_920),
    ],
)
def test_known_models_have_the_published_size(name: str, parameters: int) -> None:
    assert shapes(name).parameters == parameters


def test_the_authors_adapter_has_the_size_of_its_released_file() -> None:
    """Rank 8 on q, k and v of 32 layers: 8 * (8,192 + 5,120 + 5,120) each, in 16 bits the released 9.46 MB."""
    count = shapes("mistralai/Mistral-7B-v0.1").lora_parameters(["q_proj", "k_proj", "v_proj"], 8)
    assert count == 32 * 8 * (8192 + 5120 + 5120)
    assert 2 * count / 1e6 == pytest.approx(9.46, abs=0.03)


def test_a_head_of_its_own_is_multiplied_and_embeddings_are_looked_up() -> None:
    mistral, smollm = shapes("mistralai/Mistral-7B-v0.1"), shapes("HuggingFaceTB/SmolLM2-135M")
    assert mistral.multiplied == mistral.parameters - 32_000 * 4_096
    assert smollm.multiplied == smollm.parameters  # its head is the embeddings


def test_the_sandboxs_model_is_counted_by_its_weights_headers() -> None:
    """Embeddings of 1,280; four layers of 4 * 128 * 128 and 3 * 128 * 384 and two norms; a norm."""
    found = shapes("sandbox")
    assert found.parameters == 1280 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 384 + 2 * 128) + 128
    assert found.origin == "by its weights' headers"
    assert found.lora_parameters("all-linear", 16) == 4 * 16 * (4 * 256 + 3 * 512)


def test_an_unknown_model_is_said_to_be_one() -> None:
    assert (
        model_shapes("nobody/nothing-1B") == "nobody/nothing-1B is not on this machine, and its size is not known here"
    )


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2"])
def test_shapes_by_config_are_those_of_the_model(kind: str) -> None:
    """Names and shapes, beside what transformers builds of the same config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 100}
    if kind != "gpt2":
        sizes = {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100,
        }  # fmt: skip
    config = AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes_of_config(config.to_dict()) == expected


def test_other_architectures_are_not_guessed() -> None:
    assert shapes_of_config({"model_type": "mamba"}) is None


def test_a_model_without_all_its_weights_is_not_whole(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    )
    (tmp_path / "one.safetensors").touch()
    assert weight_files(tmp_path) == []
    assert weight_files(BASE_MODEL) == [BASE_MODEL / "model.safetensors"]


def test_the_table_can_be_counted() -> None:
    assert all(shapes_of_config(config) for config in KNOWN.values())


def test_the_plain_tokenizer_gives_the_ids_of_transformers() -> None:
    from transformers import AutoTokenizer

    plain, whole = plain_tokenizer(BASE_MODEL), AutoTokenizer.from_pretrained(BASE_MODEL)
    assert plain is not None
    texts = ["Name a fruit.", "Ünïcode, <eos> and\nlines", ""]
    assert plain(texts)["input_ids"] == whole(texts, add_special_tokens=False)["input_ids"]
    assert (plain.bos_token_id, plain.eos_token_id) == (whole.bos_token_id, whole.eos_token_id)


def test_a_folder_without_a_tokenizer_file_has_none(tmp_path: Path) -> None:
    assert plain_tokenizer(tmp_path) is None
    assert plain_tokenizer(None) is None


def test_an_adapter_has_the_shapes_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "mistralai/Mistral-7B-v0.1"}')
    assert base_name(str(tmp_path)) == "mistralai/Mistral-7B-v0.1"
    assert base_name("sandbox") == "sandbox"
    assert base_name("nobody/nothing") == "nobody/nothing"


def test_adapters_on_all_linear_layers_leave_experts_alone() -> None:
    tensors = {
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.mlp.gate.weight": (4, 8),
        "model.layers.0.mlp.experts.0.up_proj.weight": (16, 8),
        "model.embed_tokens.weight": (10, 8),
    }
    found = ModelShapes(tensors, {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}, "")
    assert list(found.adapted("all-linear")) == ["model.layers.0.self_attn.q_proj.weight"]
    assert found.multiplied == 64 + 32 + 128 / 2 + 80  # half of the experts; the embeddings are the head
    assert found.inner_width == 32
