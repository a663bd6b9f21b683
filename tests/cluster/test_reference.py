"""The reference pass on Ray: the engine's own values, each sequence once, nothing lost when cut short."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.tiny import World, plain_scorer

from cluster.running import CLUSTER, nothing
from jpo_ray.cache import key_folder
from jpo_ray.cluster import reference
from jpo_ray.cluster.reference import reference_scores
from jpo_ray.engine.reference import read_cache
from jpo_ray.engine.step import score_all

KEY = {"weights": "those of the tiny Llama"}


def scores_of(ray: Any, world: World, cache: Path, **options: Any) -> tuple[np.ndarray, int]:
    settings = {"config": CLUSTER, "model": world.model, "begin": nothing, "advance": nothing, "key": KEY} | options
    return reference_scores(ray, tokens=world.tokens, dtype="float32", load_in_4bit=False, cache=cache, **settings)


@pytest.mark.ray
def test_ray_scores_what_the_engine_scores_and_only_once(
    ray_cluster: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several micro-batches over two actors; the second call needs no Ray at all."""
    monkeypatch.setattr(reference, "PASS_TOKENS", 150)
    plain = score_all(plain_scorer(world.model), world.tokens, np.arange(24), max_tokens=400).numpy()
    begun: list[int] = []
    advanced: list[int] = []
    two = CLUSTER.model_copy(update={"num_actors": 2})
    values, scored = scores_of(ray_cluster, world, tmp_path, config=two, begin=begun.append, advance=advanced.append)
    assert values.shape == (24, 2)
    assert np.abs(values - plain).max() < 1e-5
    assert begun == [scored] == [sum(advanced)] == [24]
    assert len(advanced) > 2
    again, scored = scores_of(None, world, tmp_path)
    assert scored == 0
    assert again.tobytes() == values.tobytes()


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pass scores 3 sequences at a time, commits every 6, and fails after 9; lists what it was given."""
    given: list[int] = []

    def scored(_ray: Any, _config: Any, _tokens: Any, missing: np.ndarray, *_: Any) -> Iterator[Any]:
        given.append(len(missing))
        for start in range(0, len(missing), 3):
            if len(given) == 1 and start == 9:
                raise RuntimeError("the machine went away")
            members = missing[start : start + 3]
            yield members, np.stack([members, -members], axis=1).astype(np.float64)

    monkeypatch.setattr(reference, "_scored", scored)
    monkeypatch.setattr(reference, "COMMIT_SEQUENCES", 6)
    return given


def test_what_was_committed_before_an_end_is_not_scored_again(
    world: World, tmp_path: Path, interrupted: list[int]
) -> None:
    with pytest.raises(RuntimeError, match="went away"):
        scores_of(None, world, tmp_path)
    assert len(read_cache(tmp_path, KEY)) == 9
    values, scored = scores_of(None, world, tmp_path)
    assert interrupted == [24, 15]
    assert scored == 15
    assert values.tolist() == [[float(row), -float(row)] for row in range(24)]


def test_a_part_that_was_being_written_is_never_read(world: World, tmp_path: Path, interrupted: list[int]) -> None:
    with pytest.raises(RuntimeError, match="went away"):
        scores_of(None, world, tmp_path)
    part = next(key_folder(tmp_path, "reference", KEY).glob("part-*.parquet"))
    half = part.with_name(f".{part.name}")
    shutil.copy(part, half)
    half.write_bytes(half.read_bytes()[:50])
    assert len(read_cache(tmp_path, KEY)) == 9
    assert scores_of(None, world, tmp_path)[1] == 15
    assert interrupted == [24, 15]


def test_another_key_shares_nothing(world: World, tmp_path: Path, interrupted: list[int]) -> None:
    with pytest.raises(RuntimeError, match="went away"):
        scores_of(None, world, tmp_path)
    assert scores_of(None, world, tmp_path, key={"weights": "others"})[1] == 24
    assert interrupted == [24, 24]
