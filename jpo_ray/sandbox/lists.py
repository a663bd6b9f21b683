"""Family `lists`: name so many things of a category, leaving some out."""

from dataclasses import dataclass
from random import Random

from jpo_ray.sandbox.tasks import Family, clamp, joined, match, other, words_of
from jpo_ray.sandbox.words import CATEGORIES, ITEMS, NUMBERS

_TEMPLATES = (
    "Name {count} {category} other than {excluded}.",
    "Give me a list of {count} {category} without {excluded}.",
    "I need {count} {category}, but not {excluded}.",
    "Can you list {count} {category} except {excluded}?",
    "Please write down {count} {category}. Do not mention {excluded}.",
)
_REPLIES = (
    "Some {category} are {items}.",
    "You could take {items}.",
    "Here is a list: {items}.",
    "Good {category} are {items}.",
)
_EXCLUDED_COST = 0.5
_SLIP_COST = 0.2


@dataclass(frozen=True)
class ListTask:
    """Name `count` things of `category`, none of them `excluded`."""

    category: str
    count: int
    excluded: tuple[str, ...]

    @property
    def room(self) -> int:
        """A lead and four things."""
        return 12

    def _reply(self, rng: Random, items: list[str]) -> str:
        return rng.choice(_REPLIES).format(category=self.category, items=joined(items))

    def _items(self, rng: Random, count: int) -> list[str]:
        # People name things in a customary order; a tiny model that decodes greedily then has a next thing to name
        # instead of the same one again.
        words = CATEGORIES[self.category]
        return sorted(rng.sample([word for word in words if word not in self.excluded], count), key=words.index)

    def good(self, rng: Random) -> str:
        """Exactly as many as asked, all allowed."""
        return self._reply(rng, self._items(rng, self.count))

    def partial(self, rng: Random) -> str:
        """Too few."""
        return self._reply(rng, self._items(rng, rng.randint(1, self.count - 1)))

    def corrupted(self, rng: Random) -> str:
        """An excluded thing among them, things of another category, or one thing several times."""
        items = self._items(rng, self.count)
        kind = rng.random()
        if kind < 0.6:
            items[rng.randrange(len(items))] = rng.choice(self.excluded)
        elif kind < 0.85:
            foreign = CATEGORIES[other(rng, tuple(CATEGORIES), self.category)]
            swapped = rng.randint(1, self.count)
            items[:swapped] = rng.sample(foreign, swapped)
        else:
            items = [items[0]] * self.count
        return self._reply(rng, items)

    def accuracy(self, response: str) -> float:
        """Share of the things asked for; an excluded thing costs 0.5, every foreign, repeated or surplus one 0.2."""
        named = [word for word in words_of(response) if word in ITEMS]
        allowed = {word for word in named if word in CATEGORIES[self.category] and word not in self.excluded}
        broken = any(word in self.excluded for word in named)
        slips = len(named) - len(allowed) - sum(word in self.excluded for word in named)
        surplus = max(0, len(allowed) - self.count)
        share = min(len(allowed), self.count) / self.count
        return clamp(share - _EXCLUDED_COST * broken - _SLIP_COST * (slips + surplus))


def draw(rng: Random) -> str:
    """A random instruction of the family."""
    category = rng.choice(tuple(CATEGORIES))
    excluded = rng.sample(CATEGORIES[category], rng.choice((1, 2)))
    count = NUMBERS[rng.randint(2, 4)]
    return rng.choice(_TEMPLATES).format(count=count, category=category, excluded=" or ".join(excluded))


def parse(instruction: str) -> ListTask | None:
    """The task of the instruction, None if it is not of this family."""
    slots = match(_TEMPLATES, instruction, ("excluded",))
    if slots is None or slots["category"] not in CATEGORIES or slots["count"] not in NUMBERS[2:]:
        return None
    excluded = tuple(slots["excluded"].split(" or "))
    if not set(excluded) <= set(CATEGORIES[slots["category"]]):
        return None
    return ListTask(slots["category"], NUMBERS.index(slots["count"]), excluded)


FAMILY = Family("lists", draw, parse)
