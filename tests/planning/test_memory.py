"""Memory: by hand where the rules are arithmetic, beside the engine's own count where they were fitted."""

from typing import Any

import numpy as np
import pytest

from jpo_ray.config import RunConfig
from jpo_ray.config_file import parse_config
from jpo_ray.config_training import SFTConfig, TrainConfig
from jpo_ray.planning.memory import (
    GIB,
    GPU_GIB,
    activation_bytes,
    frozen_bytes,
    reference_gib,
    sampling_gib,
    training_gib,
)
from jpo_ray.planning.shapes import ModelShapes, model_shapes, shapes_of_config


def config(**sections: Any) -> RunConfig:
    values = {
        "items": {"train": [{"path": "sandbox"}]},
        "model": {"model_name_or_path": "mistralai/Mistral-7B-v0.1", "dtype": "bfloat16"},
        "cluster": {"gpus_per_worker": 1},
    }
    return parse_config(values | sections, "test")


def mistral() -> ModelShapes:
    found = model_shapes("mistralai/Mistral-7B-v0.1")
    assert isinstance(found, ModelShapes)
    return found


def test_frozen_weights_by_hand() -> None:
    """Of Mistral 7B 6,979,321,856 weights are in linear layers, the rest are embeddings, head and norms."""
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert sum(int(np.prod(shape)) for shape in mistral().projections.values()) == linear == 6_979_321_856
    assert frozen_bytes(config(), mistral()) == 2 * 7_241_732_096
    model = config().model.model_dump() | {"load_in_4bit": True}
    four_bit = frozen_bytes(config(model=model), mistral())
    assert four_bit == pytest.approx(0.516 * linear + 2 * (7_241_732_096 - linear))
    assert four_bit / GIB == pytest.approx(3.84, abs=0.01)


def test_whole_models_are_trained_in_float32() -> None:
    """16 bytes of a parameter for weight, gradient and two moments; sharded over four workers a quarter of that."""
    sft = {"gradient_checkpointing": True, "max_micro_batch_tokens": 1}
    alone = config(sft=sft)
    assert alone.sft is not None
    count = 7_241_732_096
    copied = 2 * count / 32  # of the layer that is computed
    assert training_gib(alone, alone.sft, mistral()) == pytest.approx((16 * count + copied) / GIB + GPU_GIB, abs=0.01)
    cluster = {"gpus_per_worker": 1, "num_workers": 4}
    four = config(sft=sft | {"sharding": "fsdp2"}, cluster=cluster)
    assert four.sft is not None
    gathered = 4 * count / 32
    assert training_gib(four, four.sft, mistral()) == pytest.approx(
        (4 * count + copied + gathered) / GIB + GPU_GIB, abs=0.01
    )


def test_eight_bit_optimizers_need_less() -> None:
    found = [
        training_gib(config(), SFTConfig(optim=optim), mistral())  # type: ignore[arg-type]
        for optim in ("adamw_torch", "paged_adamw_32bit", "adamw_8bit")
    ]
    assert found[0] == found[1]
    assert found[0] - found[2] == pytest.approx(6 * 7_241_732_096 / GIB)


def test_scoring_and_sampling_hold_the_weights() -> None:
    weights = 2 * 7_241_732_096 / GIB
    assert weights < reference_gib(config(), mistral()) < weights + 6
    assert weights < sampling_gib(config(), mistral()) < weights + 3
    assert sampling_gib(config(sample={"tensor_parallel_size": 2}), mistral()) < weights


SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 512,
}  # fmt: skip


def small_llama() -> ModelShapes:
    values = SIZES | {"model_type": "llama", "num_hidden_layers": 4}
    return ModelShapes(shapes_of_config(values) or {}, values, "")


def test_with_checkpointing_a_layer_at_a_time_is_whole() -> None:
    """float32, adapters on all linear layers: 2 * 512 + 2 * 128 + 7 * 128 elements of a layer, 128 of its input."""
    settings = config(model={"model_name_or_path": "x/y", "dtype": "float32"})
    train = TrainConfig(lora_dropout=0.0)
    assert activation_bytes(settings, train, small_llama()) == 4 * (4 * 2176 + 3 * 128)
    checkpointing = train.model_copy(update={"gradient_checkpointing": True})
    assert activation_bytes(settings, checkpointing, small_llama()) == 4 * (4 * 128 + 2176 + 3 * 128)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "training",
    [
        {"use_peft": False},
        {"lora_target_modules": ["q_proj", "k_proj", "v_proj"], "lora_dropout": 0.05},
        {"lora_target_modules": "all-linear", "lora_dropout": 0.0},
        {"lora_target_modules": "all-linear", "lora_dropout": 0.05},
    ],
    ids=["whole", "qkv", "all", "all-dropout"],
)
def test_activations_are_what_the_engine_counts(dtype: str, training: dict[str, Any]) -> None:
    """Within a quarter, on a Llama of four layers. The engine's count of a whole model in 16 bits has the copies of its
    weights in it, which the plan counts with the weights.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from jpo_ray.data.tokens import TokenizedItems
    from jpo_ray.engine import memory
    from jpo_ray.engine.model import DTYPES, add_lora
    from jpo_ray.engine.scoring import make_scorer

    train = TrainConfig(**training)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=4))
    if train.use_peft:
        model = add_lora(model.to(DTYPES[dtype]), train, seed=0)
    half_whole = dtype == "bfloat16" and not train.use_peft
    scorer = make_scorer(model, autocast=torch.bfloat16 if half_whole else None)
    scorer.model.train()
    rng = np.random.default_rng(0)
    items, length = 16, 32
    ids = rng.integers(3, 255, items * length).astype(np.int32)
    offsets = np.arange(0, items * length + 1, length).astype(np.int64)
    tokens = TokenizedItems(ids, offsets, np.full(items, 16, np.int32), 0)
    counted = memory.activation_bytes(scorer, tokens)
    if half_whole:
        linear = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
        counted -= 2 * linear / memory.PROBE_TOKENS
    planned = activation_bytes(config(model={"model_name_or_path": "x/y", "dtype": dtype}), train, small_llama())
    assert planned == pytest.approx(counted, rel=0.25)
