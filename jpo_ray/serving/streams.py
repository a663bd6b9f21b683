"""Streams of answers on their way out: the layout's prefix taken off, and small pieces sent together under load."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

BUSY_STREAMS = 4  # with fewer at a time every token is sent at once
DATA = "data: "
DONE = "[DONE]"


class Leading:
    """Takes what the layout puts before a response off its text, which comes in pieces."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._held, self.begun = prefix, "", False

    def feed(self, piece: str) -> str:
        """The part of the piece that belongs to the response."""
        if self.begun:
            return piece
        self._held += piece
        if self._prefix.startswith(self._held) and self._held != self._prefix:
            return ""
        text = without_prefix(self._held, self._prefix)
        self.begun = bool(text)
        return text

    def rest(self) -> str:
        """What was held back, where the stream ends before it can be told."""
        return "" if self.begun else without_prefix(self._held, self._prefix)


def without_prefix(text: str, prefix: str) -> str:
    return text.removeprefix(prefix).lstrip()


async def trimmed(events: AsyncGenerator[str, None], prefix: str, answers: int) -> AsyncGenerator[str, None]:
    """Server-sent events of a chat stream of so many answers, each without the prefix. Later events pass untouched."""
    leading: dict[int, Leading] = {}
    all_begun = False
    async for event in events:
        if all_begun or not event.startswith(DATA) or event[len(DATA) :].startswith(DONE):
            yield event
            continue
        content = json.loads(event[len(DATA) :])
        for choice in content.get("choices", []):
            text = leading.setdefault(choice["index"], Leading(prefix))
            piece = choice["delta"].get("content")
            if piece is not None:
                choice["delta"]["content"] = text.feed(piece)
            if choice.get("finish_reason") and not text.begun:
                choice["delta"]["content"] = (choice["delta"].get("content") or "") or text.rest()
        all_begun = len(leading) == answers and all(text.begun for text in leading.values())
        yield f"{DATA}{json.dumps(content, ensure_ascii=False)}\n\n"


def trim_answer(answer: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The same of a whole answer."""
    for choice in answer["choices"]:
        if isinstance(choice["message"].get("content"), str):
            choice["message"]["content"] = without_prefix(choice["message"]["content"], prefix)
    return answer


class Gathering:
    """Joins pieces that come within an interval, where many streams are open: each message costs as much as a token."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self.open = 0

    async def gathered(self, events: AsyncGenerator[str, None]) -> AsyncGenerator[bytes, None]:
        """The events as bytes, the first one at once. Closes `events` when it is closed itself."""
        queue: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        pump = asyncio.create_task(_pump(events, queue))
        self.open += 1
        sent = 0.0
        try:
            while True:
                pieces = [await queue.get()]
                wait = sent + self._interval_s - time.monotonic()
                if wait > 0 and self.open > BUSY_STREAMS and isinstance(pieces[0], str):
                    await asyncio.sleep(wait)
                while not queue.empty():
                    pieces.append(queue.get_nowait())
                if text := "".join(piece for piece in pieces if isinstance(piece, str)):
                    sent = time.monotonic()
                    yield text.encode()
                if isinstance(pieces[-1], BaseException):
                    raise pieces[-1]
                if pieces[-1] is None:
                    return
        finally:
            self.open -= 1
            pump.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await pump
            await events.aclose()


async def _pump(events: AsyncGenerator[str, None], queue: asyncio.Queue[str | BaseException | None]) -> None:
    try:
        async for event in events:
            queue.put_nowait(event)
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)
