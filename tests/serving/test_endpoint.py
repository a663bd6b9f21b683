"""A running server, through the official client and plain HTTP."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import openai
import pytest
import torch

from jpo_ray.data.tokens import prompt_ids
from jpo_ray.engine.model import load_model, load_tokenizer
from jpo_ray.sandbox import make_rows
from jpo_ray.serving.streams import without_prefix
from serving.conftest import store_of
from serving.endpoint import BEARER, KEY, Endpoint
from serving.malformed import CHAT_BODIES, COMPLETION_BODIES, SCORE_BODIES, TOO_LONG_BODIES
from serving.served_run import BETAS, LAYOUT

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

MODELS = ["sft", *BETAS]
ADDED = ["extra", "other"]  # folders of the store; with them the server is full
NEW_TOKENS = 16
JSON = BEARER | {"content-type": "application/json"}
INSTRUCTIONS = [row["instruction"] for row in make_rows("test", 10, 0)]
QUESTION: list[Any] = [{"role": "user", "content": INSTRUCTIONS[0]}]
Greedy = dict[tuple[str, str], str]


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[openai.OpenAI]:
    with endpoint.client() as opened:
        yield opened


@pytest.fixture(scope="module")
def greedy(served_run: Path) -> Greedy:
    """Each model's answer to each instruction by transformers and peft, one at a time."""
    from peft import PeftModel

    tokenizer = load_tokenizer(served_run / "sft")
    answers: Greedy = {}
    folders = {name: served_run / "train" / name for name in BETAS} | {
        name: store_of(served_run) / name for name in ADDED
    }
    for name in ["sft", *folders]:
        model = load_model(served_run / "sft", dtype="float32")
        if name != "sft":
            model = PeftModel.from_pretrained(model, folders[name]).eval()
        for instruction in INSTRUCTIONS:
            ids = torch.tensor(prompt_ids(tokenizer, LAYOUT, [instruction]))
            with torch.no_grad():
                output = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
                )
            text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            answers[name, instruction] = without_prefix(text, LAYOUT.response_prefix)
    for name in folders:
        assert sum(answers[name, text] != answers["sft", text] for text in INSTRUCTIONS) >= 4
    return answers


def test_models_are_listed(endpoint: Endpoint, client: openai.OpenAI) -> None:
    assert sorted(model.id for model in client.models.list()) == sorted(MODELS)
    assert client.models.retrieve("jpo").id == "jpo"
    with endpoint.http() as http:
        card = http.get("/v1/models/dpo.one").json()
    assert (card["parent"], card["beta"]) == ("sft", 0.2)


def test_base_and_adapters_mixed_under_concurrency_answer_as_transformers_do(
    endpoint: Endpoint, greedy: Greedy
) -> None:
    """Whole answers and streams, every batch a mix of models, on a server that holds as many adapters as it may: the
    trap is that base rows get the weights of the last adapter slot.
    """

    async def scenario() -> Greedy:
        at_once = asyncio.Semaphore(24)

        async def ask(client: openai.AsyncOpenAI, model: str, text: str, *, stream: bool) -> str:
            question: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}]}
            question |= {"temperature": 0, "max_tokens": NEW_TOKENS}
            async with at_once:
                if not stream:
                    reply = await client.chat.completions.create(**question)
                    return str(reply.choices[0].message.content)
                pieces = [
                    event.choices[0].delta.content or ""
                    async for event in await client.chat.completions.create(**question, stream=True)
                ]
                return "".join(pieces)

        asked = [(model, text) for text in INSTRUCTIONS for model in MODELS + ADDED]
        async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
            whole = [ask(client, model, text, stream=False) for model, text in asked]
            streamed = [ask(client, model, text, stream=True) for model, text in asked]
            both = await asyncio.gather(*whole, *streamed)
        answers, pieces = both[: len(asked)], both[len(asked) :]
        assert pieces == answers
        return dict(zip(asked, answers, strict=True))

    with endpoint.http() as http:
        for name in ADDED:
            assert http.post("/v1/adapters", json={"name": name, "folder": name}).status_code == 201
        answers = asyncio.run(scenario())
        for name in ADDED:
            assert http.delete(f"/v1/adapters/{name}").status_code == 200
    wrong = {key: (answers[key], greedy[key]) for key in greedy if answers[key].strip() != greedy[key].strip()}
    assert not wrong


def test_the_prompt_has_the_tokens_of_training(endpoint: Endpoint, client: openai.OpenAI, greedy: Greedy) -> None:
    """A raw completion of the template's own text says what the chat says; usage counts the training's tokens."""
    tokenizer = load_tokenizer(endpoint.run_dir / "sft")
    text = LAYOUT.template.replace("{instruction}", INSTRUCTIONS[1])
    ids = prompt_ids(tokenizer, LAYOUT, [INSTRUCTIONS[1]])[0]
    asked: dict[str, Any] = {"model": "jpo", "temperature": 0, "max_tokens": NEW_TOKENS}
    for prompt in (text, ids):
        reply = client.completions.create(prompt=prompt, **asked)
        assert reply.choices[0].text.strip() == greedy["jpo", INSTRUCTIONS[1]].strip()
        assert reply.usage is not None
        assert reply.usage.prompt_tokens == len(ids)
    chat = client.chat.completions.create(messages=[{"role": "user", "content": INSTRUCTIONS[1]}], **asked)
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(ids)
    several = client.completions.create(prompt=[text, text], **asked)
    assert [choice.text for choice in several.choices] == [reply.choices[0].text] * 2


def test_greedy_tokens_equal_those_of_transformers(endpoint: Endpoint, client: openai.OpenAI) -> None:
    """Token by token, EOS included, base and adapter."""
    from peft import PeftModel

    tokenizer = load_tokenizer(endpoint.run_dir / "sft")
    ids = prompt_ids(tokenizer, LAYOUT, [INSTRUCTIONS[2]])[0]
    model = load_model(endpoint.run_dir / "sft", dtype="float32")
    for name in ("sft", "jpo"):
        if name == "jpo":
            model = PeftModel.from_pretrained(model, endpoint.run_dir / "train" / name).eval()
        given = torch.tensor([ids])
        with torch.no_grad():
            output = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=40, do_sample=False
            )
        expected = output[0, len(ids) :].tolist()
        reply = client.completions.create(model=name, prompt=ids, temperature=0, max_tokens=40, logprobs=1)
        logprobs, usage = reply.choices[0].logprobs, reply.usage
        assert logprobs is not None
        assert usage is not None
        assert logprobs.tokens == [tokenizer.decode([token]) for token in expected]
        assert usage.completion_tokens == len(expected)
        assert reply.choices[0].text == tokenizer.decode(expected, skip_special_tokens=True)


def test_what_clients_ask_for_besides(client: openai.OpenAI) -> None:
    drawn = [
        client.chat.completions.create(
            model="jpo", messages=QUESTION, temperature=1, seed=seed, n=2, max_tokens=12, stop=["."]
        )
        for seed in (5, 5, 6)
    ]
    texts = [[choice.message.content for choice in reply.choices] for reply in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert not any("." in str(text) for reply in texts for text in reply)
    reply = client.chat.completions.create(
        model="sft", messages=QUESTION, max_tokens=3, logprobs=True, top_logprobs=2, temperature=0
    )
    assert reply.choices[0].finish_reason == "length"
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert [len(entry.top_logprobs) for entry in logprobs.content or []] == [2, 2, 2]
    streamed = {0: "", 1: ""}
    for event in client.chat.completions.create(
        model="jpo", messages=QUESTION, temperature=1, seed=5, n=2, max_tokens=12, stop=["."], stream=True
    ):
        for choice in event.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts[0]
    whole = client.completions.create(model="jpo", prompt="Name a fruit.", temperature=0, max_tokens=12)
    pieces = client.completions.create(model="jpo", prompt="Name a fruit.", temperature=0, max_tokens=12, stream=True)
    assert "".join(event.choices[0].text for event in pieces) == whole.choices[0].text
    events = list(
        client.chat.completions.create(
            model="sft", messages=QUESTION, max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == 3


def test_errors_come_as_the_clients_exceptions(endpoint: Endpoint, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model `gone`"):
        client.chat.completions.create(model="gone", messages=QUESTION)
    with pytest.raises(openai.UnprocessableEntityError, match="max_tokens: 65, and this server gives at most 64"):
        client.chat.completions.create(model="sft", messages=QUESTION, max_tokens=65)
    with pytest.raises(openai.UnprocessableEntityError, match=r"messages: \d+ tokens, and the model takes fewer than"):
        client.chat.completions.create(model="sft", messages=[{"role": "user", "content": "word " * 900}])
    with pytest.raises(openai.UnprocessableEntityError, match="prompt: token 50000, and the vocabulary has"):
        client.completions.create(model="sft", prompt=[1, 50000])
    with endpoint.client(api_key="sk-wrong-0123456789") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_malformed_bodies_are_never_the_servers_fault(endpoint: Endpoint) -> None:
    bodies = {"/v1/chat/completions": CHAT_BODIES, "/v1/completions": COMPLETION_BODIES, "/v1/score": SCORE_BODIES}
    with endpoint.http(headers=JSON) as client:
        for path, contents in bodies.items():
            for content in contents[::3]:
                reply = client.post(path, content=content)
                assert reply.status_code in (400, 404, 422), (path, content[:100], reply.text)
                assert len(reply.json()["error"]["message"]) <= 400
        for content in TOO_LONG_BODIES:  # too long for the model: named, and nobody else's batch fails
            reply = client.post("/v1/score", content=content)
            assert (reply.status_code, reply.json()["error"]["param"][:6]) == (422, "items."), reply.text
        assert client.post("/v1/score", content=b"x" * 1_000_001).status_code == 413
        assert client.post("/v1/nothing", content=b"{}").status_code == 404
        assert client.put("/v1/score", content=b"{}").status_code == 405


def test_without_a_key_there_is_health_alone(endpoint: Endpoint) -> None:
    with httpx.Client(base_url=endpoint.url) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}
        for path in ("/", "/v1/models", "/page.js", "/docs", "/openapi.json", "/metrics"):
            assert client.get(path).status_code == 401, path
        assert client.post("/v1/adapters", json={"name": "x", "folder": "extra"}).status_code == 401


def test_overload_is_refused_at_once_and_harms_nobody(endpoint: Endpoint) -> None:
    """Three times as many requests as the limit: the rest gets 429, quickly, and whoever is let in a whole answer."""

    async def scenario() -> list[tuple[int, float]]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=endpoint.url, headers=BEARER, timeout=120, limits=limits) as client:
            body = {"model": "sft", "messages": QUESTION, "max_tokens": 32, "ignore_eos": True}

            async def ask() -> tuple[int, float]:
                reply = await client.post("/v1/chat/completions", json=body)
                if reply.status_code == 200:
                    assert reply.json()["usage"]["completion_tokens"] == 32
                else:
                    assert reply.headers["retry-after"] == "1"
                return reply.status_code, reply.elapsed.total_seconds()

            return await asyncio.gather(*(ask() for _ in range(144)))

    replies = asyncio.run(scenario())
    times = {status: [seconds for code, seconds in replies if code == status] for status in (200, 429)}
    assert len(times[200]) + len(times[429]) == len(replies)
    assert len(times[200]) >= 48
    assert median(times[429]) < median(times[200]) / 2  # in milliseconds where the machine is idle: docs/benchmarks.md


def test_a_client_that_goes_away_frees_its_place(endpoint: Endpoint) -> None:
    """Sixty streams left after their first event, more than the limit, do not hold others back."""
    body = {"model": "sft", "messages": QUESTION, "max_tokens": 64, "ignore_eos": True, "stream": True}
    with endpoint.http() as client:
        for _ in range(60):
            with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                assert reply.status_code == 200
                next(reply.iter_lines())
        assert client.post("/v1/completions", json={"model": "sft", "prompt": "a", "max_tokens": 1}).status_code == 200


def test_metrics_are_exported(endpoint: Endpoint, client: openai.OpenAI) -> None:
    """Ray's Prometheus endpoint has the server's own metrics and vLLM's; they are sent every few seconds."""
    client.chat.completions.create(model="sft", messages=QUESTION, max_tokens=2, stream=True).close()
    address = re.search(r"metrics: (http://\S+)", endpoint.shown.read_text())
    assert address is not None
    deadline, missing = time.monotonic() + 60, {"ray_jpo_serve_requests", "ray_jpo_serve_first_token", "vllm"}
    while missing and time.monotonic() < deadline:
        text = httpx.get(address[1]).text
        missing = {name for name in missing if name not in text}
        time.sleep(0 if not missing else 2)
    assert not missing


def test_each_request_is_a_line_of_the_log(endpoint: Endpoint) -> None:
    with endpoint.http() as http:
        http.get("/v1/models", headers=BEARER | {"x-request-id": "canary-request-1"})
    address = re.search(r"logs: (\S+)", endpoint.shown.read_text())
    assert address is not None
    deadline, found = time.monotonic() + 30, []
    while not found and time.monotonic() < deadline:
        logs = [path.read_text() for path in Path(address[1]).glob("replica_jpo_FrontServer*")]
        found = [json.loads(line) for log in logs for line in log.splitlines() if "canary-request-1" in line]
        time.sleep(0.2)
    facts = {name: found[0][name] for name in ("message", "jpo_request_id", "method", "path", "status")}
    where = {"method": "GET", "path": "/v1/models"}
    assert facts == {"message": "request", "jpo_request_id": "canary-request-1", "status": 200} | where
    every_log = [path for path in Path(address[1]).parent.rglob("*") if path.is_file()]  # Ray's own among them
    assert len(every_log) > 5
    assert not any(KEY.encode() in path.read_bytes() for path in every_log)


def test_no_key_is_written_anywhere(endpoint: Endpoint, client: openai.OpenAI) -> None:
    client.models.list()
    assert KEY not in endpoint.shown.read_text()
    lists = [path.read_text() for path in (endpoint.run_dir / "serving").glob("server-*/*.json")]
    assert lists
    assert KEY not in json.dumps(lists)
