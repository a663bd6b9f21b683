"""What is trained on: items, comparisons and their order, the same for both contenders."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jpo_ray.config import BaseModelConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.data.tokens import Layout, TokenizedItems, tokenize
from jpo_ray.engine import batches
from jpo_ray.engine.dataset import EdgeList
from jpo_ray.sandbox import make_rows
from jpo_ray.sandbox.model import make_tokenizer
from throughput.graphs import Ints, circulant_groups, random_partners, shuffle_sides

SEED = 0
GROUP = 32  # items of one update in the joint works
WORKS = ("degree8", "degree2", "d_m", "conditional")
VOCABULARY = 8192
MAX_LENGTH = 1024  # tokens; nothing of the real text is cut
SYNTHETIC_INSTRUCTIONS = 512
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Texts:
    """`singles`: one (instruction, response) per instruction. `pairs`: (instruction, chosen, rejected, in_sft), where
    `in_sft` is the number (0 chosen, 1 rejected) of the response that D_S holds.
    """

    source: str
    singles: list[tuple[str, str]]
    pairs: list[tuple[str, str, str, int]]


@dataclass(frozen=True)
class Items:
    """Tokenized `singles` (n of them), and `pairs`: chosen items first, then as many rejected ones; `in_sft` int64[m]
    are the rows of `pairs` that D_S holds.
    """

    source: str
    singles: TokenizedItems
    pairs: TokenizedItems
    in_sft: Ints


@dataclass(frozen=True)
class Work:
    """One line of the benchmark. The edges fill whole updates of `per_update` comparisons."""

    name: str
    tokens: TokenizedItems
    edges: EdgeList
    per_update: int

    @property
    def updates_per_epoch(self) -> int:
        return len(self.edges) // self.per_update


def read_texts() -> Texts:
    """The real validation items where they are, else sandbox text."""
    root = Path(os.environ.get("JPO_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    folder = root / "dove" / "anthropic_helpful"
    if not (folder / "val_sft.jsonl").exists():
        rows = make_rows("train", 500, SEED)
        pairs = [(row["instruction"], row["response_0"], row["response_1"], 0) for row in rows]
        return Texts("sandbox", [(row["instruction"], row["response_0"]) for row in rows], pairs)
    sft = _read_lines(folder / "val_sft.jsonl")
    response_of = {row["instruction"]: row["response"] for row in sft}
    preferences = _read_lines(folder / "val_conditional_pref.jsonl")
    return Texts(
        "val_sft.jsonl and val_conditional_pref.jsonl",
        [(row["instruction"], row["response"]) for row in sft],
        [
            (row["i_chosen"], row["r_chosen"], row["r_reject"], int(response_of[row["i_chosen"]] == row["r_reject"]))
            for row in preferences
        ],
    )


def _read_lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tokenize_texts(texts: Texts) -> Items:
    """With a tokenizer made from the texts, in the paper's layout."""
    every = [text for single in texts.singles for text in single]
    every += [text for pair in texts.pairs for text in pair[1:3]]
    tokenizer = make_tokenizer(every, VOCABULARY)
    tokenizer.model_max_length = MAX_LENGTH
    model = BaseModelConfig(model_name_or_path="sandbox")
    layout = Layout(model.template, model.response_prefix, MAX_LENGTH)
    instructions = [pair[0] for pair in texts.pairs]
    responses = [pair[1] for pair in texts.pairs] + [pair[2] for pair in texts.pairs]
    count = len(instructions)
    return Items(
        texts.source,
        tokenize(tokenizer, layout, [single[0] for single in texts.singles], [single[1] for single in texts.singles]),
        tokenize(tokenizer, layout, instructions * 2, responses),
        np.array([number + count * pair[3] for number, pair in enumerate(texts.pairs)], dtype=np.int64),
    )


def synthetic_items(vocabulary: int) -> Items:
    """Random tokens with lengths like those of real text: log-normal, items of 300 tokens in the mean."""
    rng = np.random.default_rng([SEED, 0x53594E])
    count = SYNTHETIC_INSTRUCTIONS
    prompts = [_random_tokens(rng, 120, MAX_LENGTH // 2, vocabulary) for _ in range(count)]
    responses = [_random_tokens(rng, 180, MAX_LENGTH // 2, vocabulary) for _ in range(2 * count)]
    chosen, rejected = responses[:count], responses[count:]
    return Items(
        "random tokens", _join(prompts, chosen), _join(prompts * 2, chosen + rejected), np.arange(count, dtype=np.int64)
    )


def _random_tokens(rng: np.random.Generator, mean: int, most: int, vocabulary: int) -> Ints:
    sigma = 0.6  # the longest of 500 are then about five times the mean, as in the real text
    length = int(np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma), 4, most))
    return rng.integers(3, vocabulary, length)  # 0 to 2 are the special tokens


def _join(prompts: list[Ints], responses: list[Ints]) -> TokenizedItems:
    rows = [np.concatenate([prompt, response]) for prompt, response in zip(prompts, responses, strict=True)]
    return TokenizedItems(
        ids=np.concatenate(rows).astype(np.int32),
        offsets=np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum([len(row) for row in rows])]),
        prompt_lengths=np.array([len(prompt) for prompt in prompts], dtype=np.int32),
        truncated=0,
    )


def make_work(name: str, items: Items) -> Work:
    """The work of that name (one of `WORKS`) on these items."""
    rng = np.random.default_rng([SEED, WORKS.index(name)])
    if name in ("degree8", "degree2"):
        degree = int(name.removeprefix("degree"))
        first, second = circulant_groups(len(items.singles), GROUP, degree, rng)
        return Work(name, items.singles, _edges(*shuffle_sides(first, second, rng), joint=True), GROUP * degree // 2)
    count = len(items.in_sft)
    conditional = _edges(np.arange(count), np.arange(count) + count, joint=False)
    if name == "conditional":
        return Work(name, items.pairs, conditional.take(np.arange(count // GROUP * GROUP)), GROUP)
    first, second = random_partners(count, rng)
    joint = _edges(*shuffle_sides(items.in_sft[first], items.in_sft[second], rng), joint=True)
    # A few joint comparisons are dropped, so that every update is full.
    keep = 2 * count // GROUP * GROUP - count
    return Work(name, items.pairs, _concatenate(conditional, joint.take(rng.permutation(count)[:keep])), GROUP)


def _edges(chosen: Ints, rejected: Ints, *, joint: bool) -> EdgeList:
    count = len(chosen)
    ones = np.ones(count, dtype=np.float32)
    sides = (chosen.astype(np.int64), rejected.astype(np.int64))
    return EdgeList(*sides, joint=np.full(count, joint), weight=ones, probability=ones, gap=np.nan * ones)


def _concatenate(left: EdgeList, right: EdgeList) -> EdgeList:
    return EdgeList(*(np.concatenate([getattr(left, name), getattr(right, name)]) for name in EdgeList.__annotations__))


def train_config(work: Work, *, learning_rate: float, beta: float, max_micro_batch_tokens: int) -> TrainConfig:
    """How this engine trains on the work; the other contender takes its numbers from here."""
    return TrainConfig(
        objective="jpo" if work.edges.joint.any() else "dpo",
        protocols=["conditional", "joint"] if work.edges.joint.any() else ["conditional"],
        beta=beta,
        comparisons_per_step=work.per_update,
        batching="graph",
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        lora_dropout=0.0,
        max_micro_batch_tokens=max_micro_batch_tokens,
    )


def batch_sequence(work: Work, updates: int) -> list[EdgeList]:
    """The comparisons of the first updates, in the engine's own order (that of `preference_task`)."""
    epochs = range(-(-updates // work.updates_per_epoch))
    found = [
        batch
        for epoch in epochs
        for batch in batches.graph(work.edges.chosen, work.edges.rejected, batches.Limits(work.per_update), SEED, epoch)
    ]
    return [work.edges.take(batch) for batch in found[:updates]]


def rows_of(edges: EdgeList) -> Ints:
    return np.unique(np.concatenate([edges.chosen, edges.rejected]))


def unique_tokens(tokens: TokenizedItems, edges: EdgeList) -> int:
    """Tokens that the comparisons consist of: each instruction once and each response once."""
    rows = rows_of(edges)
    prompts = {tokens.item(int(row))[: tokens.prompt_lengths[row]].tobytes() for row in rows}
    return int(tokens.response_tokens[rows].sum()) + sum(len(prompt) for prompt in prompts) // tokens.ids.itemsize


def save_work(work: Work, path: Path) -> None:
    np.savez(
        path,
        name=work.name,
        per_update=work.per_update,
        ids=work.tokens.ids,
        offsets=work.tokens.offsets,
        prompt_lengths=work.tokens.prompt_lengths,
        **work.edges.__dict__,
    )


def load_work(path: Path) -> Work:
    with np.load(path) as file:
        tokens = TokenizedItems(file["ids"], file["offsets"], file["prompt_lengths"], 0)
        edges = EdgeList(*(file[name] for name in EdgeList.__annotations__))
        return Work(str(file["name"]), tokens, edges, int(file["per_update"]))
