"""Bodies are taken within limits, or refused with one short line that names the field."""

import json
import time
from typing import Any

import pytest

from jpo_ray.config_serve import Limits
from jpo_ray.serving.bodies import (
    AdapterBody,
    Body,
    BodyError,
    ChatBody,
    CompareBody,
    CompletionBody,
    ScoreBody,
    read_body,
)
from jpo_ray.serving.guard import error_body
from serving.malformed import CHAT_BODIES, COMPLETION_BODIES, SCORE_BODIES

LIMITS = Limits(max_tokens=100, max_n=4)
ASKED: dict[str, Any] = {"model": "jpo", "messages": [{"role": "user", "content": "Name a fruit."}]}


def chat(**fields: Any) -> ChatBody:
    return read_body(ChatBody, json.dumps(ASKED | fields).encode())


def test_what_the_openai_client_sends_is_taken() -> None:
    body = chat(
        temperature=0, top_p=0.9, max_tokens=20, n=2, stop=["\n"], seed=7, stream=True, logprobs=True, top_logprobs=2,
        stream_options={"include_usage": True}, presence_penalty=0.5, user="someone", response_format={"type": "text"},
    )  # fmt: skip
    fields = body.engine_fields(LIMITS)
    assert fields == {
        "model": "jpo", "temperature": 0.0, "top_p": 0.9, "max_tokens": 20, "n": 2, "stop": ["\n"], "seed": 7,
        "stream": True, "logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True},
        "presence_penalty": 0.5,
    }  # fmt: skip


def test_null_stands_for_not_given() -> None:
    assert chat(temperature=None, stop=None, tools=None).engine_fields(LIMITS) == {
        "model": "jpo", "max_tokens": 100, "stream": False,
    }  # fmt: skip


def test_max_completion_tokens_is_the_newer_name() -> None:
    assert chat(max_completion_tokens=9).engine_fields(LIMITS)["max_tokens"] == 9


@pytest.mark.parametrize(("field", "value", "most"), [("max_tokens", 101, 100), ("n", 5, 4)])
def test_limits(field: str, value: int, most: int) -> None:
    chat(**{field: most}).engine_fields(LIMITS)
    with pytest.raises(BodyError, match=rf"{field}: {value}, and this server gives at most {most}") as error:
        chat(**{field: value}).engine_fields(LIMITS)
    assert (error.value.status, error.value.param) == (422, field)


def test_a_conversation_becomes_the_instruction_of_training() -> None:
    lone = chat(messages=[{"role": "system", "content": " "}, {"role": "user", "content": "  Name a fruit.\n"}])
    assert lone.instruction() == "  Name a fruit.\n"
    several = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Name a fruit."},
    ]
    joined = "system: Be brief.\n\nuser: Hello\n\nassistant: Hi.\n\nuser: Name a fruit."
    assert chat(messages=several).instruction() == joined


def test_prompts_are_texts_or_ids() -> None:
    def prompts(prompt: Any) -> Any:
        return read_body(CompletionBody, json.dumps({"model": "sft", "prompt": prompt}).encode()).prompts()

    assert prompts("a") == ["a"]
    assert prompts(["a", "b"]) == ["a", "b"]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts([[1, 2], [3]]) == [[1, 2], [3]]


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        *[(ChatBody, body) for body in CHAT_BODIES],
        *[(CompletionBody, body) for body in COMPLETION_BODIES],
        *[(ScoreBody, body) for body in SCORE_BODIES],
        (CompareBody, b'{"model": "jpo", "pairs": [{"a": {"instruction": "i", "response": "r"}}]}'),
        (AdapterBody, b'{"name": "../x", "folder": "x"}'),
        (AdapterBody, b'{"name": "x", "folder": ""}'),
    ],
)
def test_malformed_bodies_are_refused_in_one_short_line(kind: type[Body], content: bytes) -> None:
    with pytest.raises(BodyError) as error:
        read_body(kind, content)
    assert error.value.status in (400, 422)
    assert len(str(error.value)) <= 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatBody, ASKED | {"x" * 5000: "x" * 5000}),
        (ChatBody, ASKED | {"messages": [{"role": "x" * 5000, "content": "y"}]}),
        (ChatBody, ASKED | {"messages": [{"role": "user", "content": "y", "x" * 5000: "x" * 5000}]}),
        (ChatBody, ASKED | {"model": "x" * 5000}),
        (CompletionBody, {"model": "jpo", "prompt": [{"x" * 5000: "x" * 5000}]}),
        (AdapterBody, {"name": "x" * 5000, "folder": "x" * 5000}),
        (ScoreBody, {"model": "jpo", "items": [{"instruction": "x" * 5000}]}),
    ],
)
def test_an_error_repeats_at_most_200_characters_of_its_input(kind: type[Body], body: dict[str, Any]) -> None:
    with pytest.raises(BodyError) as error:
        read_body(kind, json.dumps(body).encode())
    told = error_body(str(error.value), error.value.status, error.value.param).decode()
    assert told.count("x") <= 200
    assert "\n" not in told


SFT = {"model": "sft"}
USERS = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, SFT | {"prompt": [-1] * 240_000}),
        (CompletionBody, SFT | {"prompt": [1] * 400_000 + [-1]}),
        (CompletionBody, SFT | {"prompt": [[-1]] * 160_000}),
        (CompletionBody, SFT | {"prompt": [[]] * 330_000}),
        (CompletionBody, SFT | {"prompt": [""] * 330_000}),
        (ChatBody, ASKED | {f"k{number}": 1 for number in range(90_000)}),
        (ChatBody, SFT | {"messages": [{}] * 300_000}),
        (ChatBody, SFT | {"messages": USERS * 29_000}),
        (ChatBody, SFT | {"messages": [{"role": "user", "content": [{}] * 300_000}]}),
        (ChatBody, ASKED | {"stop": [""] * 300_000}),
        (ScoreBody, SFT | {"items": [{}] * 300_000}),
        (CompareBody, SFT | {"pairs": [{"a": {}}] * 90_000}),
    ],
)
def test_a_megabyte_of_errors_holds_nobody_up(kind: type[Body], body: dict[str, Any]) -> None:
    """Each of them took seconds when every error was told of, and all streams waited."""
    content = json.dumps(body, separators=(",", ":")).encode()
    assert len(content) < Limits().max_body_bytes
    began = time.thread_time()
    with pytest.raises(BodyError):
        read_body(kind, content)
    assert time.thread_time() - began < 2


@pytest.mark.parametrize(("digits", "status"), [(30, 422), (4000, 422), (5000, 400)])
def test_numbers_of_many_digits_are_not_repeated(digits: int, status: int) -> None:
    content = json.dumps(ASKED | {"max_tokens": 1}).replace("1}", "9" * digits + "}")
    with pytest.raises(BodyError) as error:
        read_body(ChatBody, content.encode()).engine_fields(LIMITS)
    assert error.value.status == status
    assert str(error.value).count("9") <= 80


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"stop": [5]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "str": 1}]}, "messages.0.str"),
        ({"best-of": 2}, "best-of"),
    ],
)
def test_the_field_is_named_as_its_sender_wrote_it(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BodyError) as error:
        chat(**body)
    assert error.value.param is not None
    assert error.value.param == field
    assert str(error.value).startswith(f"{field}: ")
