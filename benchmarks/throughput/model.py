"""Random models of given shapes, and the contenders' equal LoRA adapters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpo_ray.engine.model import DTYPES, load_model
from throughput.work import MAX_LENGTH, SEED, VOCABULARY

FOUR_BIT = "4bit"
# Standard deviation of LoRA's B for the first update. Fresh adapters have B = 0, hence all margins 0 and every loss
# log 2, which would say little about whether two contenders compute the same.
LORA_B_STD = 0.1


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool


SHAPES = {
    "tiny": Shape(2, 64, 128, 2, 2, VOCABULARY, True),  # to try the benchmark itself
    "17m": Shape(8, 384, 1024, 6, 6, VOCABULARY, True),
    "0.5b": Shape(24, 896, 4864, 14, 2, 151_936, True),  # Qwen2.5-0.5B's
    "1b": Shape(16, 2048, 8192, 32, 8, 128_256, True),  # Llama-3.2-1B's
    "3b": Shape(28, 3072, 8192, 24, 8, 128_256, True),  # Llama-3.2-3B's
    "7b": Shape(32, 4096, 14_336, 32, 8, 32_000, False),  # Mistral-7B's
}


def make_model(shape: Shape, device: str, dtype: torch.dtype) -> Any:
    """A random Llama, made on the device itself: the same for the same arguments."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def base_model(folder: Path, shape: Shape, device: str, dtype: str) -> Any:
    """The frozen model that both contenders start from; `folder` holds it on CPU and in 4 bits."""
    if device == "cuda" and dtype != FOUR_BIT:
        return make_model(shape, device, DTYPES[dtype])
    compute = "bfloat16" if dtype == FOUR_BIT else dtype
    return load_model(folder, dtype=compute, load_in_4bit=dtype == FOUR_BIT, device=device)


@torch.no_grad()
def set_lora_b(model: nn.Module) -> None:
    """The same small random values on both sides, once the reference pass is done."""
    generator = torch.Generator().manual_seed(SEED)
    for _, parameter in sorted((name, value) for name, value in model.named_parameters() if ".lora_B." in name):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * LORA_B_STD)
