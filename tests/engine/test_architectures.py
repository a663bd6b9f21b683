"""Any causal language model of transformers: scores and gradients of the engine are those of the plain model.

Each architecture is random and tiny. Dense ones differ in norms, positions, heads, biases, windows and caps; those with
experts also in their routers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from engine.tiny import (
    PER_TOKEN,
    SIZES,
    World,
    all_plain,
    config,
    difference,
    gradients_of,
    make_world,
    move,
    plain_logprobs,
    plain_model,
    plain_scorer,
    policy_scorer,
    save,
    worst_per_token,
)
from jpo_ray.config_training import TrainConfig
from jpo_ray.engine.adapters import check_base
from jpo_ray.engine.merging import merge_adapter
from jpo_ray.engine.model import add_lora, load_model
from jpo_ray.engine.step import score_all
from jpo_ray.errors import InputError

NO_HEAD_DIM = {name: size for name, size in SIZES.items() if name != "head_dim"}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# name -> class and config, their sizes and what is special about it
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-untied": ("Llama", SIZES | {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "mistral-window": ("Mistral", SIZES | {"sliding_window": 16}),
    "qwen2-tied": ("Qwen2", NO_HEAD_DIM | {"tie_word_embeddings": True}),
    "gemma2-caps": (
        "Gemma2",
        SIZES | {"sliding_window": 16, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0,
                 "final_logit_softcapping": 3.0},
    ),
    "gpt2": ("GPT2", {"vocab_size": 420, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128,
                      "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": 2, "resid_pdrop": 0.0,
                      "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("Llama", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SIZES | {"tie_word_embeddings": False}),
    "gemma": ("Gemma", SIZES | {"num_key_value_heads": 1}),
    "gemma3": ("Gemma3", SIZES | {"sliding_window": 16, "query_pre_attn_scalar": 32}),
    "neox": ("GPTNeoX", NO_HEAD_DIM | {"use_parallel_residual": True}),
    "phi3-fused": ("Phi3", NO_HEAD_DIM | {"pad_token_id": 0}),
    "qwen2-moe": ("Qwen2Moe", NO_HEAD_DIM | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3-moe": ("Qwen3Moe", SIZES | EXPERTS | {"norm_topk_prob": True}),
    "gpt-oss": (
        "GptOss",
        SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "rope_parameters": ROPE},
    ),
}  # fmt: skip
PADDED = ("gemma2-caps", "gpt-oss")  # their attention is not torch's fused one


def make(name: str, folder: Path) -> Path:
    kind, sizes = (ARCHITECTURES | MORE)[name]
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    chosen = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
    return save(model, chosen(**sizes), folder, 0, bos=kind != "GPT2")


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> World:  # noqa: ARG001
    return make_world(make(request.param, tmp_path_factory.mktemp(request.param)))


def test_scores_are_those_of_the_plain_model(built: World) -> None:
    expected, every = all_plain(built.model, built.tokens), np.arange(len(built.tokens))
    for packed in (True, False):
        scorer = plain_scorer(built.model, packed=packed)
        assert scorer.packed == (packed and built.model.name.rstrip("0") not in PADDED)
        found = score_all(scorer, built.tokens, every, max_tokens=300)
        assert worst_per_token(found, expected, built.tokens) < PER_TOKEN


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_gradients_of_a_step_are_autograds_of_the_plain_model(built: World, use_peft: bool) -> None:
    train = config(use_peft=use_peft, lora_dropout=0.0)
    expected_loss, expected = plain_gradients(built, train)
    scorer = policy_scorer(built.model, train)
    for packed in (scorer.packed, False):
        loss, gradient = gradients_of(replace(scorer, packed=packed), built.data, train)
        assert loss == pytest.approx(expected_loss, abs=1e-4)
        assert difference(gradient, expected) < 1e-3


def test_lora_is_on_experts_where_they_are_named(tmp_path: Path) -> None:
    """`all-linear` means attention's layers. The name of an expert's layer means all experts' stacked weights: without
    dropout they train as the plain model does, and the adapter fits its base, loads and merges.
    """
    world = make_world(make("mixtral", tmp_path / "base"))
    adapted = add_lora(load_model(world.model, dtype="float32"), config(), seed=0)
    of = {name.split(".self_attn.")[-1].split(".")[0] for name, p in adapted.named_parameters() if p.requires_grad}
    assert of == {"q_proj", "k_proj", "v_proj", "o_proj"}
    named = ["q_proj", "w1", "w2", "w3"]
    with pytest.raises(InputError, match=r"LoRA on experts takes no dropout; set lora_dropout: 0, or name"):
        add_lora(load_model(world.model, dtype="float32"), config(lora_target_modules=named), seed=0)
    train = config(lora_target_modules=named, lora_dropout=0.0)
    expected_loss, expected = plain_gradients(world, train)
    torch.set_num_threads(2)  # with micro-batches side by side they would take each other's weights
    try:
        scorer = policy_scorer(world.model, train)
    finally:
        torch.set_num_threads(1)
    assert scorer.cores == 1
    loss, gradient = gradients_of(scorer, world.data, train)
    assert loss == pytest.approx(expected_loss, abs=1e-4)
    assert difference(gradient, expected) < 1e-3
    scorer.model.save_pretrained(tmp_path / "adapter")
    check_base(tmp_path / "adapter", world.model, "here")
    merge_adapter(tmp_path / "adapter", world.model, tmp_path / "merged", "float32")
    scores = score_all(scorer, world.tokens, np.arange(12), max_tokens=300)
    assert (all_plain(tmp_path / "merged", world.tokens)[:12] - scores).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings|.*save_embedding_layers")  # peft's, of updates of tied layers
@pytest.mark.parametrize(
    ("name", "targets", "tied"),
    [
        ("gpt2", "all-linear", True),
        ("qwen2-tied", "all-linear", True),
        ("gemma", "all-linear", True),
        ("qwen2-tied", ["q_proj", "lm_head"], False),
        ("gemma", ["embed_tokens"], False),
    ],
)
def test_a_merged_model_scores_as_its_adapter(name: str, targets: Any, tied: bool, tmp_path: Path) -> None:
    """GPT-2's transposed weights get transposed updates. A head that is the embedding stays it, but where one of the
    two has an update, which is none of the other's. The base's scores are others.
    """
    world = make_world(make(name, tmp_path / "base"))
    scorer = policy_scorer(world.model, config(lora_dropout=0.0, lora_target_modules=targets))
    scorer.model.save_pretrained(tmp_path / "adapter")
    check_base(tmp_path / "adapter", world.model, "here")
    merge_adapter(tmp_path / "adapter", world.model, tmp_path / "merged", "float32")
    scorer.model.eval()
    expected = score_all(scorer, world.tokens, np.arange(12), max_tokens=300)
    merged, base = (all_plain(folder, world.tokens)[:12] for folder in (tmp_path / "merged", world.model))
    assert (merged - expected).abs().max() < 1e-3
    assert (base - expected).abs().max() > 0.1
    model = plain_model(tmp_path / "merged")
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def plain_gradients(world: World, train: TrainConfig) -> tuple[float, torch.Tensor]:
    """JPO's loss written out over transformers' own logits, item by item, and autograd's gradients of it."""
    policy = plain_model(world.model)
    if train.use_peft:
        policy = add_lora(policy, train, seed=0)
    move(policy)
    scores = torch.stack([plain_logprobs(policy, world.tokens, row) for row in range(12)])
    edges, reference = world.data.train[0], torch.from_numpy(world.data.reference[:12])
    ratios = scores - reference
    counted = torch.stack([torch.from_numpy(edges.joint).double(), torch.ones(len(edges)).double()], dim=1)
    margin = train.beta * ((ratios[edges.chosen] - ratios[edges.rejected]) * counted).sum(1)
    weights = torch.from_numpy(edges.weight).double()
    loss = (-F.logsigmoid(margin) * weights).sum() / weights.sum()
    loss.backward()
    found = [parameter.grad for parameter in policy.parameters() if parameter.requires_grad]
    return float(loss.detach()), torch.cat([gradient.flatten() for gradient in found if gradient is not None])
