"""Requests become the token ids of training, and what cannot fit is refused before it costs anything."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from jpo_ray.data.tokens import prompt_ids
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.serving.bodies import Body, BodyError, ChatBody, CompletionBody, read_body
from jpo_ray.serving.prompts import Prompts
from serving.served_run import LAYOUT

MOST = 64


@pytest.fixture
def prompts(llama: Path) -> Prompts:
    return Prompts(load_tokenizer(llama), LAYOUT, MOST)


def chat(text: str) -> ChatBody:
    return read_body(ChatBody, json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode())


def completion(prompt: Any) -> CompletionBody:
    return read_body(CompletionBody, json.dumps({"model": "m", "prompt": prompt}).encode())


def test_a_chat_has_the_ids_of_training(prompts: Prompts, tokenizer: Any) -> None:
    ids = prompts.of_chat(chat("Name a fruit."))
    assert ids == prompt_ids(tokenizer, LAYOUT, ["Name a fruit."])[0]
    assert prompts.of_completion(completion(LAYOUT.template.replace("{instruction}", "Name a fruit."))) == [ids]
    assert prompts.of_completion(completion([[1, 2], [3]])) == [[1, 2], [3]]


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


def test_room_for_the_answer(prompts: Prompts) -> None:
    assert prompts.room([[1] * 60], 20, wanted=False) == 4
    assert prompts.room([[1] * 40], 20, wanted=True) == 20
    with pytest.raises(BodyError, match="max_tokens: 20, and after this prompt the model takes 4"):
        prompts.room([[1] * 60, [1]], 20, wanted=True)
