"""Family `notes`: a polite note to somebody about a change of plans."""

from dataclasses import dataclass
from random import Random

from jpo_ray.sandbox.tasks import Family, clamp, match, other, words_of
from jpo_ray.sandbox.words import DAYS, EVENTS, NAMES, NUMBERS, PLACES

_TEMPLATES = (
    "Write a polite note to {name}: the {event} on {day} {change}.",
    "Tell {name} politely that the {event} on {day} {change}.",
    "Please inform {name} that the {event} on {day} {change}.",
    "Draft a message for {name} because the {event} on {day} {change}.",
)
_HOURS = NUMBERS[3:]
# The change of plans -> the word by which the oracle knows it.
_CHANGES: dict[str, str] = (
    {"is cancelled": "cancelled"}
    | {f"starts at {hour}": hour for hour in _HOURS}
    | {f"is at the {place}": place for place in PLACES}
)
_OPENINGS = ("Dear {name}, the {event}", "Hello {name}, please note that the {event}")
_CLOSINGS = ("Kind regards.", "Best wishes.")
_WEIGHTS = {"name": 0.2, "event": 0.2, "day": 0.2, "change": 0.25}
_CLOSING_WEIGHT = 0.15
_INTRUDER_COST = 0.25


@dataclass(frozen=True)
class NoteTask:
    """To whom the note goes, and what it has to say."""

    name: str
    event: str
    day: str
    change: str

    @property
    def room(self) -> int:
        """A greeting, the news, a closing."""
        return 16

    def _reply(self, rng: Random, *, closing: bool = True, **changed: str) -> str:
        slots = {"name": self.name, "event": self.event, "day": self.day, "change": self.change} | changed
        body = f"{rng.choice(_OPENINGS)} on {{day}} {{change}}.".format(**slots)
        return f"{body} {rng.choice(_CLOSINGS)}" if closing else body

    def good(self, rng: Random) -> str:
        """Greeting, the whole news, closing."""
        return self._reply(rng)

    def partial(self, rng: Random) -> str:
        """No closing and no greeting, or not the whole news."""
        return rng.choice(
            (
                f"The {self.event} {self.change}.",
                f"Hello {self.name}, the plan has changed.",
                f"Dear {self.name}, the {self.event} {self.change}.",
                f"Hello {self.name}, it {self.change}. {rng.choice(_CLOSINGS)}",
            )
        )

    def corrupted(self, rng: Random) -> str:
        """A wrong name, event, day or change; often without the closing."""
        choices = {"name": NAMES, "event": EVENTS, "day": DAYS, "change": tuple(_CHANGES)}
        mine = {"name": self.name, "event": self.event, "day": self.day, "change": self.change}
        points = rng.sample(tuple(choices), rng.randint(1, 2))
        changed = {point: other(rng, choices[point], mine[point]) for point in points}
        return self._reply(rng, closing=rng.random() < 0.5, **changed)

    def accuracy(self, response: str) -> float:
        """Weighted share of name, event, day, change and closing; every other name, day, event or change costs 0.25."""
        said = set(words_of(response))
        points = {"name": self.name.lower(), "event": self.event, "day": self.day.lower()}
        points["change"] = _CHANGES[self.change]
        share = sum(weight for key, weight in _WEIGHTS.items() if points[key] in said)
        closed = any(closing.strip(".").lower() in response.lower() for closing in _CLOSINGS)
        known = {word.lower() for word in (*NAMES, *DAYS, *EVENTS, *_CHANGES.values())}
        intruders = (said & known) - set(points.values())
        return clamp(share + _CLOSING_WEIGHT * closed - _INTRUDER_COST * len(intruders))


def draw(rng: Random) -> str:
    """A random instruction of the family."""
    kind = rng.choice(("is cancelled", "starts at", "is at the"))
    return rng.choice(_TEMPLATES).format(
        name=rng.choice(NAMES),
        event=rng.choice(EVENTS),
        day=rng.choice(DAYS),
        change=rng.choice([change for change in _CHANGES if change.startswith(kind)]),
    )


def parse(instruction: str) -> NoteTask | None:
    """The task of the instruction, None if it is not of this family."""
    slots = match(_TEMPLATES, instruction, ("change",))
    if slots is None:
        return None
    task = NoteTask(**slots)
    known = task.name in NAMES and task.event in EVENTS and task.day in DAYS and task.change in _CHANGES
    return task if known else None


FAMILY = Family("notes", draw, parse)
