"""Asking an OpenAI-compatible endpoint: many requests at once, within limits, retried with patience."""

import asyncio
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from jpo_ray.errors import InputError
from jpo_ray.feedback.answer_log import AnswerLog, Reply, prompt_key
from jpo_ray.feedback.meter import Meter, Prices
from jpo_ray.feedback.prompts import Messages

CHARACTERS_PER_TOKEN = 4  # of English; what a request takes is only known afterwards
TOKENS_PER_MESSAGE = 4
LONGEST_PAUSE_S = 60.0
TOP_LOGPROBS = 5
# What will not get better with the next request, and what to look at.
WHOLE_RUN = {401: "the key", 403: "the key's rights", 404: "model and address"}


@dataclass(frozen=True)
class Service:
    """Which model to ask, and how."""

    base_url: str
    model: str
    temperature: float | None = None  # None: the provider's default
    max_tokens: int = 16  # of an answer
    soft: bool = False  # ask for log-probs
    concurrency: int = 64
    timeout_s: float = 60.0
    max_attempts: int = 6
    first_pause_s: float = 0.5
    prices: Prices = field(default_factory=Prices)

    def key(self) -> dict[str, Any]:
        """What decides an answer besides the prompt."""
        return {
            "base_url": self.base_url,
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "soft": self.soft,
        }


@dataclass
class Asked:
    """What happened to a set of prompts. `requests` is the sum of `answers` and `failures`."""

    requests: int = 0
    answers: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)  # prompt key -> why it has no answer


class CapReachedError(InputError):
    """The next request might spend more than is allowed."""


def estimated_tokens(messages: Messages, max_tokens: int) -> int:
    """Of a request and its answer, at four characters a token."""
    characters = sum(len(message["content"]) for message in messages)
    return -(-characters // CHARACTERS_PER_TOKEN) + TOKENS_PER_MESSAGE * len(messages) + max_tokens


def ask_endpoint(
    service: Service,
    api_key: str,
    prompts: Sequence[Messages],
    log: AnswerLog,
    meter: Meter,
    progress: Callable[[int], None],
) -> Asked:
    """Ask what `log` has no answer to; answers are in `log` afterwards, and why others are missing in the result.

    Raises `CapReachedError` when the cap stops it, `InputError` where the endpoint refuses everything; what was in
    flight is waited for and kept in both cases.
    """
    missing = {prompt_key(messages): messages for messages in prompts}
    missing = {key: messages for key, messages in missing.items() if log.get(key) is None}
    asked = Asked()
    if missing:
        asyncio.run(_ask_all(service, api_key, missing, log, meter, progress, asked))
    return asked


async def _ask_all(
    service: Service,
    api_key: str,
    missing: dict[str, Messages],
    log: AnswerLog,
    meter: Meter,
    progress: Callable[[int], None],
    asked: Asked,
) -> None:
    from openai import AsyncOpenAI

    left = iter(missing.items())
    stopped: list[InputError] = []
    async with AsyncOpenAI(
        api_key=api_key, base_url=service.base_url, max_retries=0, timeout=service.timeout_s
    ) as client:

        async def work() -> None:
            for key, messages in left:  # shared: each worker takes the next
                try:
                    found = await _ask(client, service, api_key, messages, meter, asked)
                except InputError as error:
                    stopped.append(error)
                    return
                if isinstance(found, Reply):
                    log.append(key, found)
                else:
                    asked.reasons[key] = found
                progress(1)
                if stopped:
                    return

        await asyncio.gather(*(work() for _ in range(min(service.concurrency, len(missing)))))
    if stopped:
        raise stopped[0]


async def _ask(
    client: Any, service: Service, api_key: str, messages: Messages, meter: Meter, asked: Asked
) -> Reply | str:
    """A reply, or why there is none."""
    options: dict[str, Any] = {"model": service.model, "messages": messages, "max_tokens": service.max_tokens}
    if service.temperature is not None:
        options["temperature"] = service.temperature
    if service.soft:
        options |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
    reserved = estimated_tokens(messages, service.max_tokens)
    most = service.prices.cost(reserved - service.max_tokens, service.max_tokens)
    reason = ""
    for attempt in range(service.max_attempts):
        wait = meter.reserve(reserved, most)
        if wait is None:
            raise CapReachedError("")
        await asyncio.sleep(wait)
        asked.requests += 1
        try:
            reply = _reply(await client.chat.completions.with_raw_response.create(**options))
        except Exception as error:
            meter.settle(-reserved, -most)
            failure = _failure(error, service, api_key)
            asked.failures[failure.kind] += 1
            reason = failure.reason
            if not failure.again:
                return reason
            if attempt + 1 < service.max_attempts:
                await asyncio.sleep(failure.pause if failure.pause is not None else _backoff(service, attempt))
            continue
        asked.answers += 1
        cost = service.prices.cost(reply.prompt_tokens, reply.completion_tokens)
        meter.settle(reply.prompt_tokens + reply.completion_tokens - reserved, cost - most)
        return reply
    return f"no answer after {service.max_attempts} attempts: {reason}"


def _backoff(service: Service, attempt: int) -> float:
    """Seconds: twice as long each time, by chance up to a half shorter, so that requests do not come back together."""
    return min(LONGEST_PAUSE_S, service.first_pause_s * 2.0**attempt) * random.uniform(0.5, 1)


class BrokenReplyError(ValueError):
    """A body that is not the JSON of a chat completion."""


def _reply(response: Any) -> Reply:
    """Raises `BrokenReplyError` where the body is not what the protocol says."""
    try:
        body = json.loads(response.content)
        choice, usage = body["choices"][0], body.get("usage") or {}
        message = choice["message"]
        text = message.get("content") or ""
        refused = message.get("refusal") or (
            "content filter" if choice.get("finish_reason") == "content_filter" else ""
        )
        return Reply(
            str(text),
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
            str(refused),
            share_of_a(choice.get("logprobs")),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise BrokenReplyError(f"{type(error).__name__}: {error}") from error


def share_of_a(logprobs: Any) -> float | None:
    """The probability of `(a)` among `(a)` and `(b)`, from the alternatives of the token that tells them apart.

    Tokenizers cut `Output (a)` in their own ways: that token is the first which is a or b but for brackets and blanks.
    """
    for position in (logprobs or {}).get("content") or []:
        if _letter(position["token"]):
            of_letter = {"a": 0.0, "b": 0.0}
            for alternative in position.get("top_logprobs") or [position]:
                if letter := _letter(alternative["token"]):
                    of_letter[letter] += math.exp(alternative["logprob"])
            return of_letter["a"] / sum(of_letter.values()) if any(of_letter.values()) else None
    return None


def _letter(token: str) -> str:
    bare = token.strip(" ()`*").lower()
    return bare if bare in ("a", "b") else ""


@dataclass(frozen=True)
class _Failure:
    kind: str
    reason: str
    again: bool = True
    pause: float | None = None  # seconds, where the endpoint says so


def _failure(error: Exception, service: Service, api_key: str) -> _Failure:
    """Raises `InputError` for what will fail with every prompt; whatever is no fault of the exchange goes on up."""
    import openai

    said = _without_key(" ".join(str(error).split())[:300], api_key)
    if isinstance(error, openai.APITimeoutError):
        return _Failure("timeout", f"no answer in {service.timeout_s:g} s")
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        if status in WHOLE_RUN:
            hint = {
                401: "check the key (OPENAI_API_KEY)",
                403: "check the key's rights",
                404: "check model and address",
            }
            raise InputError(f"judge: {service.base_url} answers {status} for {service.model}; {hint[status]}: {said}")
        again = status == 429 or status == 408 or status == 409 or status >= 500
        return _Failure(str(status), f"status {status}: {said}", again, _retry_after(error.response.headers))
    if isinstance(error, openai.APIConnectionError):
        return _Failure("connection", f"no connection: {_without_key(str(error.__cause__ or error), api_key)[:300]}")
    if isinstance(error, BrokenReplyError | openai.APIError):
        return _Failure("broken", f"no chat completion: {said}")
    raise error


def _without_key(text: str, api_key: str) -> str:
    """Providers quote the key in their errors, whole or with its middle left out."""
    text = text.replace(api_key, "[key]") if api_key else text
    return re.sub(r"\bsk-[\w*.-]+", "[key]", text)


def _retry_after(headers: Any) -> float | None:
    """Seconds that the endpoint asks to wait, at most a minute: a number, or a date."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif "retry-after" in headers and headers["retry-after"].strip().replace(".", "", 1).isdigit():
            seconds = float(headers["retry-after"])
        elif "retry-after" in headers:
            seconds = (parsedate_to_datetime(headers["retry-after"]) - datetime.now(UTC)).total_seconds()
        else:
            return None
    except (ValueError, TypeError):
        return None
    return min(LONGEST_PAUSE_S, max(0.0, seconds))
