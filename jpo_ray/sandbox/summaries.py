"""Family `summaries`: one sentence that keeps the points of a short post."""

from dataclasses import dataclass
from random import Random

from jpo_ray.sandbox.tasks import Family, clamp, match, other, sentence, words_of
from jpo_ray.sandbox.words import ADJECTIVES, DEEDS, FILLERS, NAMES, OUTCOMES, PLACES, THINGS

_TEMPLATES = (
    "Summarize this post in one sentence. Post: {post}",
    "What is the main point of this post? Post: {post}",
    "Write a short summary. Post: {post}",
    "Too long, please shorten. Post: {post}",
)
_POSTS = (
    "{filler} {name} {deed} a {adjective} {thing} at the {place}. In the end {outcome}.",
    "{name} {deed} a {adjective} {thing} at the {place}. {filler} In the end {outcome}.",
    "At the {place} {name} {deed} a {adjective} {thing}. {filler} Then {outcome}.",
)
_REPLIES = (
    "{name} {deed} a {thing} at the {place} and {outcome}.",
    "At the {place} {name} {deed} a {thing} and {outcome}.",
)
_WEIGHTS = {"name": 0.2, "deed": 0.15, "thing": 0.25, "place": 0.15, "outcome": 0.25}
_INTRUDER_COST = 0.2


@dataclass(frozen=True)
class SummaryTask:
    """The points of one post; `filler` is what a summary leaves out."""

    name: str
    deed: str
    thing: str
    place: str
    outcome: str
    filler: str

    @property
    def room(self) -> int:
        """One sentence."""
        return 16

    def _points(self) -> dict[str, str]:
        return {
            "name": self.name,
            "deed": self.deed,
            "thing": self.thing,
            "place": self.place,
            "outcome": self.outcome,
        }

    def good(self, rng: Random) -> str:
        """All points in one sentence."""
        return rng.choice(_REPLIES).format(**self._points())

    def partial(self, rng: Random) -> str:
        """Some points only."""
        return rng.choice(
            (
                f"{self.name} was at the {self.place}.",
                f"{self.name} {self.deed} a {self.thing}.",
                f"It is about {self.name} and a {self.thing}.",
                f"In the end {self.outcome}.",
            )
        )

    def corrupted(self, rng: Random) -> str:
        """Points of another story, or what does not matter."""
        points = self._points()
        if rng.random() < 0.2:
            return f"{self.filler} {sentence(self.outcome)}."
        for point in rng.sample(("name", "thing", "place", "outcome"), rng.randint(1, 3)):
            words = {"name": NAMES, "thing": THINGS, "place": PLACES, "outcome": tuple(OUTCOMES)}[point]
            points[point] = other(rng, words, points[point])
        return rng.choice(_REPLIES).format(**points)

    def accuracy(self, response: str) -> float:
        """Weighted share of the points; every name, thing, place or outcome from elsewhere costs 0.2."""
        said = set(words_of(response))
        points = {key: word.lower() for key, word in self._points().items()} | {"outcome": OUTCOMES[self.outcome]}
        share = sum(weight for key, weight in _WEIGHTS.items() if points[key] in said)
        known = {word.lower() for word in (*NAMES, *THINGS, *PLACES, *OUTCOMES.values())}
        intruders = (said & known) - set(points.values()) - set(words_of(self.filler))
        return clamp(share - _INTRUDER_COST * len(intruders))


def draw(rng: Random) -> str:
    """A random instruction of the family."""
    post = rng.choice(_POSTS).format(
        filler=rng.choice(FILLERS),
        name=rng.choice(NAMES),
        deed=rng.choice(DEEDS),
        adjective=rng.choice(ADJECTIVES),
        thing=rng.choice(THINGS),
        place=rng.choice(PLACES),
        outcome=rng.choice(tuple(OUTCOMES)),
    )
    return rng.choice(_TEMPLATES).format(post=post)


def parse(instruction: str) -> SummaryTask | None:
    """The task of the instruction, None if it is not of this family."""
    outer = match(_TEMPLATES, instruction, ("post",))
    slots = match(_POSTS, outer["post"], ("filler", "outcome")) if outer else None
    if slots is None:
        return None
    adjective = slots.pop("adjective")
    known = (NAMES, DEEDS, THINGS, PLACES, OUTCOMES, FILLERS)
    task = SummaryTask(**slots)
    values = (task.name, task.deed, task.thing, task.place, task.outcome, task.filler)
    if adjective not in ADJECTIVES or any(value not in words for value, words in zip(values, known, strict=True)):
        return None
    return task


FAMILY = Family("summaries", draw, parse)
