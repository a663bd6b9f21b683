"""The reference pass on Ray Data: items that the cache lacks are scored in an actor pool."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jpo_ray.cluster.session import map_on_actors
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.lanes import side_by_side
from jpo_ray.engine.micro_batches import micro_batches
from jpo_ray.engine.model import load_model
from jpo_ray.engine.reference import append_cache, missing_rows, read_cache
from jpo_ray.engine.scoring import make_scorer, score_items

PASS_TOKENS = 4096  # of one forward pass without gradients
Rows = dict[str, tuple[float, float]]  # sequence id -> instruction and response log-prob
COMMIT_SEQUENCES = 20_000  # cached at least this often, so that a kill loses little


class ReferenceScorer:
    """Actor that scores micro-batches, a row each; those of a call side by side, on CPUs."""

    def __init__(self, model: str, dtype: str, load_in_4bit: bool, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        loaded = load_model(Path(model), dtype=dtype, load_in_4bit=load_in_4bit, device=device)
        self.scorer = make_scorer(loaded)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = range(len(batch["batch"]))
        scores = side_by_side([partial(self._score, *unpacked(batch, row)) for row in rows])
        return {"batch": batch["batch"], "scores": scores}

    def _score(self, tokens: TokenizedItems, rows: range) -> bytes:
        import torch

        with torch.no_grad():
            return score_items(self.scorer, tokens, rows).cpu().numpy().tobytes()


def packed_rows(tokens: TokenizedItems, batches: list[npt.NDArray[np.int64]]) -> list[dict[str, Any]]:
    """A row of a Ray dataset for each micro-batch."""
    return [{"batch": number} | _packed(tokens, members) for number, members in enumerate(batches)]


def unpacked(batch: dict[str, Any], row: int) -> tuple[TokenizedItems, range]:
    """The items of one such row, and their numbers in it."""
    ids, offsets, prompts = (np.asarray(batch[name][row]) for name in ("ids", "offsets", "prompt_lengths"))
    tokens = TokenizedItems(ids.astype(np.int32), offsets.astype(np.int64), prompts.astype(np.int32), truncated=0)
    return tokens, range(len(prompts))


def reference_scores(
    ray: Any,
    config: ClusterConfig,
    tokens: TokenizedItems,
    *,
    model: Path,
    dtype: str,
    load_in_4bit: bool,
    cache: Path,
    key: dict[str, Any],
    begin: Callable[[int], None],
    advance: Callable[[int], None],
) -> tuple[npt.NDArray[np.float64], int]:
    """Reference log-probs of every row, float64[rows, 2], and how many sequences had to be scored for it.

    Micro-batches are formed here, so the values do not depend on the number of actors. New rows enter the cache as
    they come; `begin(total)` and `advance(n)` report progress in sequences.
    """
    cached = read_cache(cache, key)
    missing = missing_rows(tokens, cached)
    begin(len(missing))
    fresh: Rows = {}
    try:
        for members, scores in _scored(ray, config, tokens, missing, model, dtype, load_in_4bit):
            for row, (instruction, response) in zip(members, scores.tolist(), strict=True):
                fresh[tokens.sequence_id(int(row))] = (instruction, response)
            advance(len(members))
            if len(fresh) >= COMMIT_SEQUENCES:
                fresh = _commit(cache, key, fresh, cached)
    finally:  # an error or Ctrl-C loses nothing that was scored
        _commit(cache, key, fresh, cached)
    values = [cached[tokens.sequence_id(row)] for row in range(len(tokens))]
    return np.array(values, dtype=np.float64).reshape(-1, 2), len(missing)


def _commit(cache: Path, key: dict[str, Any], fresh: Rows, cached: Rows) -> Rows:
    """Write `fresh` to the cache and count it as cached; returns an empty dictionary to go on with."""
    if fresh:
        append_cache(cache, key, ((sequence, *pair) for sequence, pair in fresh.items()))
        cached.update(fresh)
    return {}


def _scored(
    ray: Any,
    config: ClusterConfig,
    tokens: TokenizedItems,
    missing: npt.NDArray[np.int64],
    model: Path,
    dtype: str,
    load_in_4bit: bool,
) -> Any:
    """Yield (rows, float64[len(rows), 2]) as micro-batches finish."""
    if not len(missing):
        return
    batches = micro_batches(tokens, missing, PASS_TOKENS, packed=True)
    rows, arguments = packed_rows(tokens, batches), (str(model), dtype, load_in_4bit)
    for row in map_on_actors(
        ray, config, "reference", rows, ReferenceScorer, *arguments, row_per_cpu=True, needs=[model]
    ):
        yield batches[row["batch"]], np.frombuffer(row["scores"], dtype=np.float64).reshape(-1, 2)


def _packed(tokens: TokenizedItems, members: npt.NDArray[np.int64]) -> dict[str, Any]:
    offsets = np.concatenate([[0], np.cumsum(tokens.lengths[members])])
    ids = np.concatenate([tokens.item(int(member)) for member in members])
    return {"ids": ids, "offsets": offsets, "prompt_lengths": tokens.prompt_lengths[members]}
