"""Tiny models and the items and edges that the tests of the engine share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jpo_ray.config_objective import OBJECTIVES
from jpo_ray.config_training import TrainConfig
from jpo_ray.data.tokens import Layout, TokenizedItems, tokenize
from jpo_ray.engine.dataset import EdgeList, EdgeShards, PreferenceData
from jpo_ray.engine.model import add_lora, load_model, load_tokenizer
from jpo_ray.engine.scoring import Scorer, make_scorer
from jpo_ray.engine.sharding import whole
from jpo_ray.engine.step import score_all
from jpo_ray.engine.tasks import preference_task
from jpo_ray.sandbox.model import make_tokenizer

LAYOUT = Layout("### Instructions: {instruction}\n\n### Response:", " ", 96)
INSTRUCTIONS = [
    "Name a fruit.",
    "List four colours other than blue, in any order.",
    "What is the capital of France?",
    "Sum up: the cat slept all day and woke up hungry at night.",
    "Copy: one two three",
    "Say hello to the whole world, politely, and then say goodbye.",
]
RESPONSES = [
    ("An apple.", "I would rather not say which fruit comes to mind."),
    ("Red, green, white, black.", "Blue, blue, blue and blue again."),
    ("Paris.", "It is hard to tell."),
    ("A cat slept and woke hungry.", "The dog barked."),
    ("one two three", "three two one zero"),
    ("Hello, dear world. Goodbye.", "No."),
]
DROPOUT = 0.2
PER_TOKEN = 1e-5  # nats: rounding of float32 over two layers
SIZES = {
    "vocab_size": 420, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip


@cache
def small_tokenizer() -> Any:
    return make_tokenizer([*INSTRUCTIONS, *(text for pair in RESPONSES for text in pair)], 420)


def make_llama(folder: Path, *, seed: int = 0, tied: bool = True) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=420, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    return save(LlamaForCausalLM, config, folder, seed)


def make_gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=420, n_embd=64, n_layer=2, n_head=2, n_positions=128, initializer_range=0.1, bos_token_id=None,
        eos_token_id=2, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip
    return save(GPT2LMHeadModel, config, folder, 0, bos=False)


def save(kind: Any, config: Any, folder: Path, seed: int, *, bos: bool = True) -> Path:
    """A model of random weights with the small tokenizer."""
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(seed)
    kind(config).save_pretrained(folder)
    tokenizer = small_tokenizer()
    if not bos:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>"
        )
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class World:
    """Twelve items (`make_world`: two to each of six instructions, 2i and 2i + 1), and what the model says of them."""

    model: Path
    data: PreferenceData

    @property
    def tokens(self) -> TokenizedItems:
        return self.data.tokens


def make_world(model: Path) -> World:
    """Conditional edges within each instruction, joint ones between them."""
    conditional = [(2 * i, 2 * i + 1) for i in range(6)]
    joint = [(0, 3), (2, 5), (4, 0), (7, 8), (10, 1), (9, 6)]
    return world_of(model, INSTRUCTIONS, RESPONSES, edges(conditional, joint), edges([(1, 0)], [(3, 0)]))


def make_lists(model: Path) -> World:
    """Four responses to each of three instructions: all compared, some, and two of them alone."""
    lists = [RESPONSES[number] + RESPONSES[number + 3] for number in range(3)]
    every = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    train = edges([*every, (5, 4), (5, 7), (4, 6), (11, 8)], [])
    return world_of(model, INSTRUCTIONS[:3], lists, train, edges([(0, 1), (1, 3), (9, 8)], []))


def world_of(
    model: Path, instructions: list[str], responses: Sequence[Sequence[str]], train: EdgeList, validation: EdgeList
) -> World:
    """Twelve items, and a mismatched one of each; random embeddings of the instructions."""
    each = 12 // len(instructions)
    texts = [text for some in responses for text in some]
    mismatched = [texts[(i + each) % 12] for i in range(12)]
    shown = [text for text in instructions for _ in range(each)]
    tokens = tokenize(load_tokenizer(model), LAYOUT, shown * 2, texts + mismatched)
    reference = score_all(plain_scorer(model), tokens, np.arange(24), max_tokens=4096).numpy()
    directions = np.random.default_rng(0).normal(size=(len(instructions), 4))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    embeddings = np.repeat(directions.astype(np.float16), each, axis=0)
    return World(model, PreferenceData(tokens, reference, 12, EdgeShards.of(train), validation, embeddings))


def edges(conditional: list[tuple[int, int]], joint: list[tuple[int, int]]) -> EdgeList:
    """Weights 1, 2, 1, 2, ... so that an unweighted mean is not the weighted one; gaps 0.5, 1.5, 2.5, 0.5, ..."""
    both = np.array([*conditional, *joint], dtype=np.int64).reshape(-1, 2)
    kinds = np.array([False] * len(conditional) + [True] * len(joint))
    weights = 1 + np.arange(len(both), dtype=np.float32) % 2
    gaps = 0.5 + np.arange(len(both), dtype=np.float32) % 3
    return EdgeList(both[:, 0].copy(), both[:, 1].copy(), kinds, weights, np.ones_like(weights), gaps)


def only_conditional(data: PreferenceData) -> PreferenceData:
    return replace(data, train=EdgeShards.of(data.train[0].take(np.flatnonzero(~data.train[0].joint))))


def config(**options: Any) -> TrainConfig:
    """LoRA with dropout, all edges in one step, beta 0.5."""
    name = options.get("objective", "jpo")
    if OBJECTIVES[name].conditional_only:
        options.setdefault("protocols", ["conditional"])
    if name == "sft":
        options.setdefault("name", "sft-term")  # the SFT model has its name
    defaults = {
        "comparisons_per_step": 64, "lora_r": 4, "lora_dropout": DROPOUT, "warmup_steps": 0,
        "learning_rate": 1e-2, "seed": 0,
    }  # fmt: skip
    if name in ("jpo", "dpo", "kto"):
        defaults["beta"] = 0.5
    return TrainConfig(**(defaults | options))


def plain_scorer(model: Path, *, packed: bool = True) -> Scorer:
    return make_scorer(load_model(model, dtype="float32"), packed=packed)


def policy_scorer(model: Path, train: TrainConfig, *, moved: bool = True) -> Scorer:
    """A policy in training mode. `moved`: a little away from the reference, so that margins and all gradients live."""
    policy = load_model(model, dtype="float32")
    if train.use_peft:
        policy = add_lora(policy, train, seed=0)
    if moved:
        move(policy)
    policy.train()
    return make_scorer(policy, dropout_seed=3)


@torch.no_grad()
def move(policy: Any) -> None:
    """Change all trained parameters a little, every time alike."""
    generator = torch.Generator().manual_seed(7)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)


def gradients_of(scorer: Scorer, data: PreferenceData, train: TrainConfig, step: int = 0) -> tuple[float, torch.Tensor]:
    """Loss and all parameter gradients, laid end to end, of one training step."""
    scorer.model.zero_grad(set_to_none=True)
    metrics = preference_task(scorer, data, train, seed=0).gradients(step)
    found = [parameter.grad for parameter in scorer.model.parameters() if parameter.requires_grad]
    return metrics["loss"], torch.cat([whole(gradient).flatten() for gradient in found if gradient is not None])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm of `b`."""
    return float((a - b).norm() / b.norm())


def plain_logprobs(model: Any, tokens: TokenizedItems, row: int) -> torch.Tensor:
    """By transformers' own forward and torch's log_softmax: instruction part, response part, float64[2]."""
    ids = torch.from_numpy(tokens.item(row).astype(np.int64)).unsqueeze(0)
    logprobs = model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
    each = logprobs.gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1)
    boundary = int(tokens.prompt_lengths[row]) - 1
    return torch.stack([each[:boundary].sum(), each[boundary:].sum()])


def plain_model(folder: Path) -> Any:
    """By transformers alone, with the attention that it writes out."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def all_plain(folder: Path, tokens: TokenizedItems) -> torch.Tensor:
    model = plain_model(folder).eval()
    return torch.stack([plain_logprobs(model, tokens, row) for row in range(len(tokens))])


def worst_per_token(a: torch.Tensor, b: torch.Tensor, tokens: TokenizedItems) -> float:
    return float(((a - b).abs().sum(1) / torch.from_numpy(tokens.lengths)).max())
