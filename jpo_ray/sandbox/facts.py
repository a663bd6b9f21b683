"""Family `facts`: questions with one or two answers over a small fact base."""

from dataclasses import dataclass
from random import Random

from jpo_ray.sandbox.tasks import Family, clamp, match, other, words_of
from jpo_ray.sandbox.words import ATTRIBUTES, FACTS

_TEMPLATES = (
    "What is {asked}?",
    "Tell me {asked}.",
    "Do you know {asked}?",
    "I would like to know {asked}.",
    "Quick question: what is {asked}?",
)
# The forms with two answers come first: the form with one would swallow them.
_ASKED = (
    "the {first} and the {second} of {subject}",
    "the {first} of {subject} and of {rival}",
    "the {first} of {subject}",
)
_WRONG_COST = 0.4
_KINDS = ("country", "animal", "job")
_COUNTED = ("young", "home", "tool", "workplace")


@dataclass(frozen=True)
class FactTask:
    """Pairs (subject with its article, attribute), all of one kind of subjects."""

    kind: str
    asked: tuple[tuple[str, str], ...]

    @property
    def room(self) -> int:
        """About eight words to an answer."""
        return 9 * len(self.asked)

    def _value(self, subject: str, attribute: str) -> str:
        return FACTS[self.kind][subject.split()[-1]][ATTRIBUTES[self.kind].index(attribute)]

    def _choices(self, attribute: str) -> list[str]:
        column = ATTRIBUTES[self.kind].index(attribute)
        return sorted({values[column] for values in FACTS[self.kind].values()})

    def _reply(self, rng: Random, values: list[str]) -> str:
        values = [self._shown(position, value) for position, value in enumerate(values)]
        if len(self.asked) == 1 and rng.random() < 0.4:
            return f"It is {values[0]}."
        (subject, attribute), *rest = self.asked
        text = f"The {attribute} of {subject} is {values[0]}"
        if rest and len(values) == 2:
            what = f"the {rest[0][1]}" if rest[0][0] == subject else f"that of {rest[0][0]}"
            text += f" and {what} is {values[1]}"
        return text + "."

    def _shown(self, position: int, value: str) -> str:
        return _with_article(value) if self.asked[position][1] in _COUNTED else value

    def _right(self) -> list[str]:
        return [self._value(*pair) for pair in self.asked]

    def _wrong(self, rng: Random, position: int) -> str:
        return other(rng, self._choices(self.asked[position][1]), *self._right())

    def good(self, rng: Random) -> str:
        """Everything asked, correct."""
        return self._reply(rng, self._right())

    def partial(self, rng: Random) -> str:
        """One answer of two, or two values to choose from."""
        if len(self.asked) == 2 and rng.random() < 0.7:
            return self._reply(rng, self._right()[:1])
        subject, attribute = self.asked[0]
        values = [self._value(subject, attribute), self._wrong(rng, 0)]
        rng.shuffle(values)
        first, second = (self._shown(0, value) for value in values)
        return f"The {attribute} of {subject} is {first} or {second}."

    def corrupted(self, rng: Random) -> str:
        """One or all answers wrong."""
        values = self._right()
        for position in range(len(values)):
            if len(values) == 1 or position == 0 or rng.random() < 0.5:
                values[position] = self._wrong(rng, position)
        return self._reply(rng, values)

    def accuracy(self, response: str) -> float:
        """Share of the answers found; every other value of the same attribute costs 0.4."""
        said = set(words_of(response))
        right = {value.lower() for value in self._right()}
        choices = {choice.lower() for _, attribute in self.asked for choice in self._choices(attribute)}
        wrong = (said & choices) - right
        return clamp(len(said & right) / len(right) - _WRONG_COST * len(wrong))


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def draw(rng: Random) -> str:
    """A random instruction of the family."""
    kind = rng.choices(_KINDS, (3, 2, 1))[0]
    first, second = rng.sample(ATTRIBUTES[kind], 2)
    name = rng.choice(sorted(FACTS[kind]))
    column = ATTRIBUTES[kind].index(first)
    rivals = [rival for rival in sorted(FACTS[kind]) if FACTS[kind][rival][column] != FACTS[kind][name][column]]
    subject, rival = _subject(kind, name), _subject(kind, rng.choice(rivals))
    form = rng.choices(_ASKED, (2, 2, 1))[0]
    asked = form.format(first=first, second=second, subject=subject, rival=rival)
    return rng.choice(_TEMPLATES).format(asked=asked)


def _subject(kind: str, name: str) -> str:
    return name if kind == "country" else _with_article(name)


def _kind_of(subject: str) -> str | None:
    return next((kind for kind in _KINDS for name in FACTS[kind] if _subject(kind, name) == subject), None)


def parse(instruction: str) -> FactTask | None:
    """The task of the instruction, None if it is not of this family."""
    outer = match(_TEMPLATES, instruction, ("asked",))
    slots = match(_ASKED, outer["asked"], ("subject", "rival")) if outer else None
    if slots is None:
        return None
    subjects = [slots["subject"], slots.get("rival", slots["subject"])]
    attributes = [slots["first"], slots.get("second", slots["first"])]
    kind = _kind_of(subjects[0])
    if kind is None or _kind_of(subjects[1]) != kind or not set(attributes) <= set(ATTRIBUTES[kind]):
        return None
    asked = tuple(dict.fromkeys(zip(subjects, attributes, strict=True)))
    return FactTask(kind, asked)


FAMILY = Family("facts", draw, parse)
