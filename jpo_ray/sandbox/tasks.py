"""What a family of instructions is, and the few text operations that all families share."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import NamedTuple, Protocol


class Task(Protocol):
    """One instruction, understood: it can write responses of each kind and tell how accurate any response is."""

    @property
    def room(self) -> int:
        """Words that a complete response needs at most; what goes beyond is rambling."""

    def good(self, rng: Random) -> str:
        """A complete and correct response."""

    def partial(self, rng: Random) -> str:
        """A response that leaves out or blurs a part of what was asked."""

    def corrupted(self, rng: Random) -> str:
        """A response that is wrong or breaks a constraint of the instruction."""

    def accuracy(self, response: str) -> float:
        """Share of the instruction that the response fulfils, less its mistakes, in [0, 1]; style does not count."""


class Family(NamedTuple):
    """A kind of instructions: `draw` writes one at random, `parse` reads one back (None if it is not of the family)."""

    name: str
    draw: Callable[[Random], str]
    parse: Callable[[str], Task | None]


def words_of(text: str) -> list[str]:
    """The words of the text in lower case, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def joined(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def sentence(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def clamp(value: float) -> float:
    """The nearest number in [0, 1]."""
    return min(1.0, max(0.0, value))


def other(rng: Random, words: Sequence[str], *taken: str) -> str:
    """A random one of the words that is not taken."""
    return rng.choice([word for word in words if word not in taken])


@cache
def _pattern(template: str, phrases: tuple[str, ...]) -> re.Pattern[str]:
    pattern = re.escape(template)
    for slot in re.findall(r"\{(\w+)\}", template):
        pattern = pattern.replace(rf"\{{{slot}\}}", f"(?P<{slot}>{'.+?' if slot in phrases else '[A-Za-z]+'})")
    return re.compile(pattern)


def match(templates: Sequence[str], text: str, phrases: tuple[str, ...] = ()) -> dict[str, str] | None:
    """The slots of the first template that could have produced the whole text, or None.

    A slot holds one word; those named in `phrases` hold any text.
    """
    for template in templates:
        found = _pattern(template, phrases).fullmatch(text)
        if found:
            return found.groupdict()
    return None
