"""Streams lose the layout's prefix and nothing else, and gather what comes close together."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpo_ray.serving.streams import Gathering, Leading, trim_answer, trimmed, without_prefix


def event(index: int, content: str | None, finish: str | None = None) -> str:
    delta = {} if content is None else {"content": content}
    return f"data: {json.dumps({'choices': [{'index': index, 'delta': delta, 'finish_reason': finish}]})}\n\n"


async def source(*events: str) -> AsyncGenerator[str, None]:
    for one in events:
        yield one


def texts(events: list[str]) -> dict[int, str]:
    found: dict[int, str] = {}
    for one in events:
        if one.startswith("data: {"):
            for choice in json.loads(one[6:])["choices"]:
                found[choice["index"]] = found.get(choice["index"], "") + (choice["delta"].get("content") or "")
    return found


def trim(prefix: str, *events: str, answers: int = 1) -> list[str]:
    async def run() -> list[str]:
        return [one async for one in trimmed(source(*events), prefix, answers)]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("prefix", "pieces", "whole"),
    [
        (" ", [" Paris", " is"], "Paris is"),
        (" ", ["", " ", "\n", " Paris", " ."], "Paris ."),
        ("", ["Paris"], "Paris"),
        ("Answer: ", ["Ans", "wer", ":", " Paris"], "Paris"),
        ("Answer: ", ["Ans", "cestors"], "Anscestors"),
        ("Answer: ", ["Ans"], "Ans"),
        (" ", ["  "], ""),
    ],
)
def test_the_prefix_is_taken_off(prefix: str, pieces: list[str], whole: str) -> None:
    events = [event(0, piece) for piece in pieces] + [event(0, "", "stop"), "data: [DONE]\n\n"]
    assert texts(trim(prefix, *events)) == {0: whole}
    assert without_prefix("".join(pieces), prefix) == whole


@given(st.text(max_size=12), st.lists(st.text(max_size=4), max_size=8))
def test_pieces_say_what_the_whole_says(prefix: str, pieces: list[str]) -> None:
    leading = Leading(prefix)
    said = "".join([*(leading.feed(piece) for piece in pieces), leading.rest()])
    assert said == without_prefix("".join(pieces), prefix)


def test_several_answers_of_one_stream() -> None:
    events = [
        event(0, " a"),
        event(1, " "),
        event(1, "b"),
        event(0, " c"),
        event(1, None, "stop"),
        event(0, " d", "stop"),
    ]
    assert texts(trim(" ", *events, answers=2)) == {0: "a c d", 1: "b"}


def test_events_after_the_beginning_pass_untouched() -> None:
    odd = 'data: {"choices":[{"index":0,"delta":{"content":" x"}}],"kept":  1}\n\n'
    assert trim(" ", event(0, " a"), odd, "data: [DONE]\n\n")[1:] == [odd, "data: [DONE]\n\n"]


def test_whole_answers() -> None:
    answer: dict[str, Any] = {"choices": [{"message": {"content": " Paris "}}, {"message": {"content": None}}]}
    contents = [choice["message"]["content"] for choice in trim_answer(answer, " ")["choices"]]
    assert contents == ["Paris ", None]


def gathered(gathering: Gathering, events: AsyncGenerator[str, None]) -> list[bytes]:
    async def run() -> list[bytes]:
        return [piece async for piece in gathering.gathered(events)]

    return asyncio.run(run())


async def ticking(count: int) -> AsyncGenerator[str, None]:
    for number in range(count):
        yield f"{number} "
        await asyncio.sleep(0.005)


def test_few_streams_are_sent_as_they_come_and_many_together() -> None:
    whole = b"".join(f"{number} ".encode() for number in range(20))
    alone = gathered(Gathering(0.05), ticking(20))
    assert (len(alone), b"".join(alone)) == (20, whole)
    busy = Gathering(0.05)
    busy.open = 10
    together = gathered(busy, ticking(20))
    assert b"".join(together) == whole
    assert together[0] == b"0 "
    assert len(together) <= 6
    assert busy.open == 10


def test_a_failing_stream_says_all_that_came_before() -> None:
    async def failing() -> AsyncGenerator[str, None]:
        yield "a"
        raise RuntimeError("broken")

    found = []

    async def run() -> None:
        async for piece in Gathering(0.0).gathered(failing()):
            found.append(piece)

    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(run())
    assert b"".join(found) == b"a"


def test_a_stream_that_is_left_ends_its_source() -> None:
    ended = []

    async def endless() -> AsyncGenerator[str, None]:
        try:
            while True:
                yield "x"
                await asyncio.sleep(0.001)
        finally:
            ended.append(True)

    async def run() -> None:
        stream = Gathering(0.0).gathered(endless())
        await anext(stream)
        await stream.aclose()

    asyncio.run(run())
    assert ended == [True]
