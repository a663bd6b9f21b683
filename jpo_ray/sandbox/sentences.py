"""Family `sentences`: one sentence with two given words and without a third."""

from dataclasses import dataclass
from random import Random

from jpo_ray.sandbox.tasks import Family, clamp, match, other, words_of
from jpo_ray.sandbox.words import ADJECTIVES, CATEGORIES, THINGS

_TEMPLATES = (
    "Write one sentence with the words {first} and {second}, but not the word {banned}.",
    "Use {first} and {second} in a sentence. Avoid the word {banned}.",
    "Make up a sentence about a {first} and a {second}. Never say {banned}.",
)
_REPLIES = (
    "The {adjective} {first} stood next to the {second}.",
    "She put the {first} behind the {adjective} {second}.",
    "We saw a {first} and a very {adjective} {second}.",
    "He sold the {adjective} {first} to buy a {second}.",
)
_NOUNS: tuple[str, ...] = (
    THINGS + CATEGORIES["furniture"] + CATEGORIES["clothes"] + CATEGORIES["instruments"] + CATEGORIES["vehicles"]
)
_WORD_WEIGHT = 0.4
_FORM_WEIGHT = 0.2
_BANNED_COST = 0.5
_SHORTEST_SENTENCE = 6


@dataclass(frozen=True)
class SentenceTask:
    """Two nouns to use and an adjective not to use."""

    first: str
    second: str
    banned: str

    @property
    def room(self) -> int:
        """One sentence."""
        return 11

    def _reply(self, rng: Random, first: str, second: str, adjective: str) -> str:
        return rng.choice(_REPLIES).format(first=first, second=second, adjective=adjective)

    def good(self, rng: Random) -> str:
        """Both words, the banned one avoided."""
        return self._reply(rng, self.first, self.second, other(rng, ADJECTIVES, self.banned))

    def partial(self, rng: Random) -> str:
        """One of the words, or both without a sentence around them."""
        if rng.random() < 0.3:
            return f"{self.first.capitalize()} and {self.second}."
        return f"There was a {rng.choice((self.first, self.second))}."

    def corrupted(self, rng: Random) -> str:
        """The banned word, or other nouns."""
        first, second = self.first, self.second
        if rng.random() < 0.65:
            return self._reply(rng, first, second, self.banned)
        first = other(rng, _NOUNS, first, second)
        if rng.random() < 0.5:
            second = other(rng, _NOUNS, self.first, first, second)
        return self._reply(rng, first, second, other(rng, ADJECTIVES, self.banned))

    def accuracy(self, response: str) -> float:
        """0.4 for each word and 0.2 for a sentence of at least six words; the banned word costs 0.5."""
        said = words_of(response)
        found = (self.first in said) + (self.second in said)
        form = found > 0 and len(said) >= _SHORTEST_SENTENCE
        return clamp(_WORD_WEIGHT * found + _FORM_WEIGHT * form - _BANNED_COST * (self.banned in said))


def draw(rng: Random) -> str:
    """A random instruction of the family."""
    first, second = rng.sample(_NOUNS, 2)
    return rng.choice(_TEMPLATES).format(first=first, second=second, banned=rng.choice(ADJECTIVES))


def parse(instruction: str) -> SentenceTask | None:
    """The task of the instruction, None if it is not of this family."""
    slots = match(_TEMPLATES, instruction)
    if slots is None:
        return None
    task = SentenceTask(**slots)
    known = task.first in _NOUNS and task.second in _NOUNS and task.banned in ADJECTIVES
    return task if known and task.first != task.second else None


FAMILY = Family("sentences", draw, parse)
