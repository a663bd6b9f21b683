"""The tokenizer, tiny models, pretraining, and the base model that ships with the package."""

import json
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jpo_ray.sandbox import BASE_MODEL, make_rows
from jpo_ray.sandbox.model import make_tiny_model, make_tokenizer
from jpo_ray.sandbox.pretrain import PROMPT, Example, encode, examples_of, mean_loss, pretrain
from jpo_ray.sandbox.rows import split_of

TEXTS = [PROMPT.format(instruction=row["instruction"]) + " " + row["response_0"] for row in make_rows("train", 300, 0)]
ODD = ["Zürich, naïve, 東京", "\U0001f642 emoji\ttab", "  two  spaces ", "line\n\nbreak", "don't , stop !", "\x00\x7f"]


def test_tokenizer_gives_any_text_back_and_adds_bos_only_when_asked() -> None:
    tokenizer = make_tokenizer(TEXTS, 600)
    assert len(tokenizer) == 600
    for text in [*ODD, *TEXTS[:20]]:
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(bare) == text
        assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *bare]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_tokenizer_refuses_a_vocabulary_below_the_bytes() -> None:
    with pytest.raises(ValueError, match="byte-level BPE needs 259"):
        make_tokenizer(TEXTS, 258)


def test_tiny_model_is_saved_loaded_and_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_tiny_model(TEXTS, tmp_path / name, vocab_size=500, hidden_size=64, intermediate_size=96, layers=1, seed=4)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    # embeddings 500*64, attention 4*64*64, MLP 3*64*96, three norms of 64
    assert model.num_parameters() == 500 * 64 + 4 * 64 * 64 + 3 * 64 * 96 + 3 * 64
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (config["architectures"], config["head_dim"]) == (["LlamaForCausalLM"], 32)
    assert json.loads((tmp_path / "a" / "generation_config.json").read_text())["eos_token_id"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    for text in ODD:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer("Hi")["input_ids"][0] == 1


def test_tiny_model_refuses_a_width_that_heads_do_not_divide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden_size 100 is no multiple of 32"):
        make_tiny_model(TEXTS, tmp_path / "model", vocab_size=300, hidden_size=100)
    assert not (tmp_path / "model").exists()


def test_prompt_and_response_are_tokenized_apart() -> None:
    tokenizer = make_tokenizer(TEXTS, 600)
    (ids,) = encode(tokenizer, [Example("What is the capital of France?", "It is Paris.")])
    prompt = tokenizer(PROMPT.format(instruction="What is the capital of France?"), add_special_tokens=False)
    response = tokenizer(" It is Paris.", add_special_tokens=False)
    assert ids == [1, *prompt["input_ids"], *response["input_ids"], 2]


def test_loss_of_a_padded_batch_is_the_token_mean_of_its_sequences() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    batch = encode(tokenizer, list(examples_of(Random(1), 4)))
    with torch.no_grad():
        sums = [mean_loss(model, [ids]).item() * (len(ids) - 1) for ids in batch]
        together = mean_loss(model, batch).item()
    assert together == pytest.approx(sum(sums) / sum(len(ids) - 1 for ids in batch), rel=1e-5)


def test_pretraining_sees_only_instructions_of_the_train_split() -> None:
    assert {split_of(example.instruction) for example in examples_of(Random(0), 500)} == {"train"}


def test_pretraining_lowers_the_loss_and_leaves_only_the_model(tmp_path: Path) -> None:
    report = pretrain(
        tmp_path / "base", examples=480, batch_size=4, vocab_size=500, hidden_size=64, intermediate_size=96, layers=1,
        progress=False,
    )  # fmt: skip
    assert report["first_loss"] > 4.0
    assert report["final_loss"] < report["first_loss"] - 0.7
    assert report["parameters"] == 500 * 64 + 4 * 64 * 64 + 3 * 64 * 96 + 3 * 64
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert (tmp_path / "base" / "model.safetensors").stat().st_size < 500_000


def test_pretraining_refuses_less_than_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="less than one batch of 64"):
        pretrain(tmp_path / "base", examples=10)


def test_the_shipped_model_knows_unseen_text_of_the_world_and_is_small() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    rows = make_rows("test", 200, 11)
    batch = encode(tokenizer, [Example(row["instruction"], row["gold_response"]) for row in rows])
    with torch.no_grad():
        assert mean_loss(model, batch).item() < 0.75
    assert 1_000_000 < model.num_parameters() < 2_500_000
    assert sum(path.stat().st_size for path in BASE_MODEL.iterdir()) < 8_000_000
    assert max(len(ids) for ids in batch) < 128
