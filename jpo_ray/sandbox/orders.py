"""Family `orders`: repeat, reverse, sort, pick or count the given words."""

from dataclasses import dataclass
from random import Random

from jpo_ray.sandbox.tasks import Family, clamp, joined, match, other, words_of
from jpo_ray.sandbox.words import ITEMS, NUMBERS

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "repeat": ("Repeat these words: {words}.", "Copy the words {words}."),
    "reverse": ("Put these words in reverse order: {words}.", "Write the words {words} backwards, the last one first."),
    "sort": ("Put these words in alphabetical order: {words}.", "Sort the words {words} from a to z."),
    "first": ("What is the first of these words: {words}?", "Which word comes first here: {words}?"),
    "last": ("What is the last of these words: {words}?", "Which word comes last here: {words}?"),
    "count": ("How many words are these: {words}?", "Count these words: {words}."),
}
_REPLIES = ("The words are {words}.", "Here they are: {words}.", "In this order: {words}.")
_POOL: tuple[str, ...] = tuple(sorted(ITEMS))
_EXTRA_COST = 0.25


@dataclass(frozen=True)
class OrderTask:
    """One operation on a few distinct words."""

    operation: str
    words: tuple[str, ...]

    @property
    def room(self) -> int:
        """The words and a short lead."""
        return len(self.words) + 5

    def _expected(self) -> list[str]:
        orders = {"repeat": list(self.words), "reverse": list(self.words[::-1]), "sort": sorted(self.words)}
        picks = {"first": [self.words[0]], "last": [self.words[-1]], "count": [NUMBERS[len(self.words)]]}
        return (orders | picks)[self.operation]

    def _reply(self, rng: Random, answer: list[str]) -> str:
        if self.operation == "count":
            return f"There are {' or '.join(answer)} words."
        if self.operation in ("first", "last"):
            lead = rng.choice((f"The {self.operation} word is", "It is"))
            return f"{lead} {' or '.join(answer)}."
        return rng.choice(_REPLIES).format(words=joined(answer))

    def _candidates(self) -> tuple[str, ...]:
        return NUMBERS[2:8] if self.operation == "count" else self.words

    def good(self, rng: Random) -> str:
        """The expected answer."""
        return self._reply(rng, self._expected())

    def partial(self, rng: Random) -> str:
        """The beginning of the answer, or two answers to choose from."""
        expected = self._expected()
        if len(expected) > 1:
            return self._reply(rng, expected[: rng.randint(1, len(expected) - 1)])
        answers = [*expected, other(rng, self._candidates(), *expected)]
        rng.shuffle(answers)
        return self._reply(rng, answers)

    def corrupted(self, rng: Random) -> str:
        """Another order, another word."""
        expected = self._expected()
        if len(expected) == 1:
            return self._reply(rng, [other(rng, self._candidates(), *expected)])
        answer = rng.sample(expected, len(expected))
        if answer == expected or rng.random() < 0.4:
            answer[rng.randrange(len(answer))] = other(rng, _POOL, *expected)
        return self._reply(rng, answer)

    def accuracy(self, response: str) -> float:
        """Share of the positions that are right; a surplus or foreign word costs 0.25 (a rival answer 0.5)."""
        expected = self._expected()
        pool = NUMBERS if self.operation == "count" else ITEMS
        said = [word for word in words_of(response) if word in pool]
        if len(expected) == 1:
            rivals = set(said) - set(expected)
            return clamp((expected[0] in said) - 2 * _EXTRA_COST * len(rivals))
        right = sum(mine == theirs for mine, theirs in zip(said, expected, strict=False))
        foreign = sum(word not in expected for word in said)
        surplus = max(0, len(said) - len(expected))
        return clamp(right / len(expected) - _EXTRA_COST * max(foreign, surplus))


def draw(rng: Random) -> str:
    """A random instruction of the family."""
    operation = rng.choices(tuple(_TEMPLATES), (3, 3, 3, 1, 1, 2))[0]
    words = rng.sample(_POOL, rng.randint(2, 6) if operation == "count" else rng.randint(3, 4))
    return rng.choice(_TEMPLATES[operation]).format(words=", ".join(words))


def parse(instruction: str) -> OrderTask | None:
    """The task of the instruction, None if it is not of this family."""
    for operation, templates in _TEMPLATES.items():
        slots = match(templates, instruction, ("words",))
        if slots:
            words = tuple(slots["words"].split(", "))
            valid = 2 <= len(words) < len(NUMBERS) and len(set(words)) == len(words) and set(words) <= ITEMS
            return OrderTask(operation, words) if valid else None
    return None


FAMILY = Family("orders", draw, parse)
