"""Asking a language model many prompts at once, wherever it runs; every answer is in the log before it is used."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field

from jpo_ray.errors import InputError
from jpo_ray.feedback.answer_log import AnswerLog, Reply, prompt_key
from jpo_ray.feedback.prompts import Messages
from jpo_ray.store import StoreError

HOPELESS = 20  # prompts in a row without an answer, or as many as are in flight: an outage


@dataclass(frozen=True)
class Outcome:
    """What became of one prompt. `requests` is the number of failures, and one more where there is a reply."""

    reply: Reply | None = None
    reason: str = ""  # why there is no reply
    requests: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    final: bool = False  # without a reply: the model was asked and refused, so that asking again would not help
    stop: InputError | None = None  # what will befall every other prompt as well


@dataclass
class Asked:
    """What happened to a set of prompts. `requests` is the sum of `answers` and `failures`."""

    requests: int = 0
    answers: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)  # prompt key -> why it has no answer
    unanswered: set[str] = field(default_factory=set)  # keys of those that another time might have one


AskOne = Callable[[Messages], Awaitable[Outcome]]
Model = Callable[[], AbstractAsyncContextManager[AskOne]]  # opened once for a set of prompts


def ask_missing(
    model: Model, prompts: Sequence[Messages], log: AnswerLog, concurrency: int, progress: Callable[[int], None]
) -> Asked:
    """Ask what `log` has no answer to, `concurrency` prompts at a time.

    Answers are in `log` afterwards, and why others are missing in the result. Raises the `InputError` of an outcome
    that stops it all, and one where nothing comes any more; what was in flight is waited for and kept.
    """
    missing = {prompt_key(messages): messages for messages in prompts}
    missing = {key: messages for key, messages in missing.items() if log.get(key) is None}
    try:
        asked = asyncio.run(_ask_all(model, missing, log, concurrency, progress)) if missing else Asked()
    except BaseException:
        with suppress(StoreError):  # they are on this machine, and the next run sends them
            log.send()
        raise
    log.send()
    return asked


async def _ask_all(
    model: Model, missing: dict[str, Messages], log: AnswerLog, concurrency: int, progress: Callable[[int], None]
) -> Asked:
    asked, left = Asked(), iter(missing.items())
    stopped: list[InputError] = []
    in_a_row = 0  # prompts without a reply
    async with model() as ask:

        async def work() -> None:
            nonlocal in_a_row
            for key, messages in left:  # shared: each worker takes the next
                outcome = await ask(messages)
                in_a_row = 0 if outcome.reply is not None else in_a_row + 1
                asked.requests += outcome.requests
                asked.failures += outcome.failures
                if outcome.reply is not None:
                    asked.answers += 1
                    log.append(key, outcome.reply)
                if outcome.stop is not None:
                    stopped.append(outcome.stop)
                elif in_a_row >= max(concurrency, HOPELESS):
                    stopped.append(_outage(in_a_row, outcome.reason))
                if stopped:
                    return
                if outcome.reply is None:
                    asked.reasons[key] = outcome.reason
                    if not outcome.final:
                        asked.unanswered.add(key)
                progress(1)

        await asyncio.gather(*(work() for _ in range(min(concurrency, len(missing)))))
    if stopped:
        raise stopped[0]
    return asked


def _outage(prompts: int, reason: str) -> InputError:
    return InputError(
        f"judge: {prompts} prompts in a row got no answer ({reason}); what was answered is kept: mend that and run the "
        "same command again"
    )
