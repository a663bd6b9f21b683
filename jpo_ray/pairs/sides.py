"""The items on one side of the candidate matrix, and hashes of them that stand in for random numbers."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Side:
    """Items on one side of the candidate matrix: R of them."""

    keys: Keys  # uint64[R], from the item ids
    instructions: Ints  # int64[R]: which instruction; its vector's row
    _: KW_ONLY
    groups: Ints | None = None  # int64[R]: only items of one group are compared, where given
    parts: Ints | None = None  # int64[R]: only items of different parts are compared, where given
    facts: Mapping[str, Floats] = field(default_factory=dict)  # float32[R] each: what strategies know of items

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Ints | slice) -> "Side":
        return replace(
            self,
            keys=self.keys[rows],
            instructions=self.instructions[rows],
            groups=None if self.groups is None else self.groups[rows],
            parts=None if self.parts is None else self.parts[rows],
            facts={name: values[rows] for name, values in self.facts.items()},
        )


def item_keys(item_ids: list[str]) -> Keys:
    """uint64 keys from hexadecimal item ids."""
    return np.array([int(item_id[:16], 16) for item_id in item_ids], dtype=np.uint64)


def mix(x: Keys) -> Keys:
    """SplitMix64's finaliser: a bijective hash of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seeded(keys: Keys, seed: int, purpose: int) -> Keys:
    """A hash of each key, another one for each seed and purpose."""
    return mix(keys ^ mix(np.array([seed * 256 + purpose], dtype=np.uint64)))


def random_groups(keys: Keys, count: int, seed: int) -> Ints:
    """Spread items evenly over `count` groups at random, by their keys: int64[R]."""
    groups = np.empty(len(keys), dtype=np.int64)
    groups[np.argsort(seeded(keys, seed, purpose=0))] = np.arange(len(keys)) * count // len(keys)
    return groups


def rank_in_run(values: npt.NDArray[np.integer]) -> Ints:
    """Place of each element within its run of equal neighbours, from 0: int64[K]."""
    starts = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return np.arange(len(values)) - np.repeat(starts, np.diff(np.append(starts, len(values))))


def float32(vectors: npt.NDArray[np.float16]) -> Floats:
    """Finite float16 as float32, by its bits: numpy's own conversion takes nine times as long."""
    bits = vectors.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= np.int32(-0x70002000)  # sign, exponent and fraction, without the copies of the sign
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)  # the difference of the exponents' biases
    return values
