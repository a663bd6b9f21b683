"""Requests become the token ids of training, and what cannot fit is refused before it costs anything."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from jpo_ray.data.tokens import Layout, prompt_ids, tokenize
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.serving.bodies import Body, BodyError, ChatBody, CompletionBody, Item, read_body
from jpo_ray.serving.prompts import Prompts
from serving.served_run import LAYOUT

MOST = 64


@pytest.fixture
def prompts(llama: Path) -> Prompts:
    return Prompts(load_tokenizer(llama), LAYOUT, MOST, vocabulary=10**6)


def chat(text: str) -> ChatBody:
    return read_body(ChatBody, json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode())


def completion(prompt: Any) -> CompletionBody:
    return read_body(CompletionBody, json.dumps({"model": "m", "prompt": prompt}).encode())


def test_a_chat_has_the_ids_of_training(prompts: Prompts, tokenizer: Any) -> None:
    ids = prompts.of_chat(chat("Name a fruit."))
    assert ids == prompt_ids(tokenizer, LAYOUT, ["Name a fruit."])[0]
    assert prompts.of_completion(completion(LAYOUT.template.replace("{instruction}", "Name a fruit."))) == [ids]
    assert prompts.of_completion(completion([[1, 2], [3]])) == [[1, 2], [3]]


def test_a_chat_template_lays_out_what_training_learned(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompts = Prompts(tokenizer, Layout("chat", "", 256), MOST, vocabulary=10**6)
    messages = [{"role": "user", "content": "Name a fruit."}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompts.of_chat(chat("Name a fruit.")) == expected


def test_tokens_that_a_model_does_not_embed_are_refused(llama: Path) -> None:
    """A tokenizer may know tokens that were added after the model was made: they would end the engine."""
    tokenizer = load_tokenizer(llama)
    embedded = len(tokenizer)
    tokenizer.add_tokens(["<added>"])
    prompts = Prompts(tokenizer, LAYOUT, MOST, vocabulary=embedded)
    message = rf"token {embedded}, and the vocabulary has {embedded}$"
    with pytest.raises(BodyError, match=f"^prompt: {message}"):
        prompts.of_completion(completion([embedded]))
    with pytest.raises(BodyError, match=f"^messages: {message}"):
        prompts.of_chat(chat("Say <added>."))
    with pytest.raises(BodyError, match=rf"^items\.0: {message}"):
        prompts.require_scorable({"items.0": Item(instruction="i", response="<added>")})
    assert prompts.of_completion(completion([embedded - 1])) == [[embedded - 1]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (chat("word " * 70), r"^messages: \d+ tokens, and the model takes fewer than 64$"),
        (chat("a" * 990_000), r"^messages: 990000 characters, and the model takes fewer than 64 tokens$"),
        (completion("word " * 70), r"^prompt: \d+ tokens, and the model takes fewer than 64$"),
        (
            completion(["a", "word " * 190_000]),
            r"^prompt: 950000 characters, and the model takes fewer than 64 tokens$",
        ),
        (completion([1] * 64), r"^prompt: 64 tokens, and the model takes fewer than 64$"),
        (completion([1] * 300_000), r"^prompt: 300000 tokens, and the model takes fewer than 64 tokens$"),
        (completion([10**6]), r"^prompt: token 1000000, and the vocabulary has \d+$"),
    ],
)
def test_prompts_that_do_not_fit(prompts: Prompts, body: Body, message: str) -> None:
    began = time.process_time()
    with pytest.raises(BodyError, match=message) as error:
        _ = prompts.of_chat(body) if isinstance(body, ChatBody) else prompts.of_completion(body)  # type: ignore[arg-type]
    assert error.value.status == 422
    assert time.process_time() - began < 0.5


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Item(instruction="word " * 300, response="r"), r"^items\.1: \d+ tokens, and scores are of at most 256 tokens"),
        (Item(instruction="i", response="word " * 300), r"^items\.1: \d+ tokens, and scores are of at most 256 tokens"),
        (Item(instruction="i", response="a" * 990_000), r"^items\.1: 990000 characters, and scores are of at most 256"),
    ],
)
def test_items_that_would_be_cut_are_not_scored(prompts: Prompts, item: Item, message: str) -> None:
    with pytest.raises(BodyError, match=message) as error:
        prompts.require_scorable({"items.0": Item(instruction="i", response="r"), "items.1": item})
    assert (error.value.status, error.value.param) == (422, "items.1")


def test_items_are_scorable_up_to_the_length_of_training(prompts: Prompts, tokenizer: Any) -> None:
    def tokens(words: int) -> Any:
        return tokenize(tokenizer, LAYOUT, ["i"], ["a " * words])

    most = max(words for words in range(1, 300) if not tokens(words).truncated)
    assert tokens(most).lengths[0] <= LAYOUT.max_length
    prompts.require_scorable({"items.0": Item(instruction="i", response="a " * most)})
    with pytest.raises(BodyError):
        prompts.require_scorable({"items.0": Item(instruction="i", response="a " * (most + 1))})


def test_room_for_the_answer(prompts: Prompts) -> None:
    assert prompts.room([[1] * 60], 20, wanted=False) == 4
    assert prompts.room([[1] * 40], 20, wanted=True) == 20
    with pytest.raises(BodyError, match="max_tokens: 20, and after this prompt the model takes 4"):
        prompts.room([[1] * 60, [1]], 20, wanted=True)
