"""What trained policies say of items, in an actor pool: log-ratios to the reference, or embeddings of responses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jpo_ray.cluster.reference import PASS_TOKENS, packed_rows, unpacked
from jpo_ray.cluster.session import map_on_actors
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.adapters import CONFIG, load_adapter
from jpo_ray.engine.micro_batches import micro_batches
from jpo_ray.engine.model import load_model
from jpo_ray.engine.scoring import make_scorer, response_embeddings, score_items

Fact = Literal["log_ratio", "embedding"]


class PolicyReader:
    """Actor; a row is one micro-batch under one policy. It holds one policy at a time."""

    def __init__(self, base: str, dtype: str, load_in_4bit: bool, fact: Fact, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._base = Path(base)
        self._options: dict[str, Any] = {"dtype": dtype, "load_in_4bit": load_in_4bit, "device": device}
        self._fact, self._folder = fact, Path()
        self._scorer: Any = None
        self._reference: Any = None  # of a policy that is no adapter: the base's own scorer

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        folders = [Path(folder) for folder in batch["folder"]]
        found = [self.read(folder, *unpacked(batch, row)) for row, folder in enumerate(folders)]
        return {"batch": batch["batch"], "found": [values.tobytes() for values in found]}

    def read(self, folder: Path, tokens: TokenizedItems, rows: range | npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """Log-ratios of instruction and response, float32[n, 2] in nats, or embeddings, float32[n, D]."""
        import torch

        self._load(folder)
        with torch.no_grad():
            if self._fact == "embedding":
                return response_embeddings(self._scorer, tokens, rows).cpu().numpy()
            scores = score_items(self._scorer, tokens, rows)
            if self._reference is not None:
                scores = scores - score_items(self._reference, tokens, rows)
            else:
                with self._scorer.model.disable_adapter():
                    scores = scores - score_items(self._scorer, tokens, rows)
            return scores.float().cpu().numpy()

    def _load(self, folder: Path) -> None:
        if folder == self._folder:
            return
        self._scorer = None  # two do not fit at once where one hardly does
        if (folder / CONFIG).exists():
            self._scorer = make_scorer(load_adapter(folder, self._base, **self._options))
        else:
            self._scorer = make_scorer(load_model(folder, **self._options))
            self._reference = self._reference or make_scorer(load_model(self._base, **self._options))
        self._folder = folder


def policy_facts(
    ray: Any,
    config: ClusterConfig,
    stage: str,
    tokens: TokenizedItems,
    *,
    policies: Sequence[tuple[Path, npt.NDArray[np.intp]]],
    base: Path,
    dtype: str,
    load_in_4bit: bool,
    fact: Fact,
    bar: Any,
) -> list[npt.NDArray[np.float32]]:
    """A fact of rows of `tokens` under each policy: a folder, of an adapter on `base` or of a whole model made from it,
    and the rows it reads.

    That is their log-ratio of policy and reference, float32[rows, 2] (instruction, response), or embedding, [rows, D].
    """
    batches = [
        (number, members)
        for number, (_, wanted) in enumerate(policies)
        for members in micro_batches(tokens, wanted, PASS_TOKENS, packed=True)
    ]
    packed = packed_rows(tokens, [members for _, members in batches])
    rows = [
        row | {"batch": place, "folder": str(policies[number][0])}
        for place, (row, (number, _)) in enumerate(zip(packed, batches, strict=True))
    ]
    bar.begin(sum(len(wanted) for _, wanted in policies))
    found: list[dict[int, npt.NDArray[np.float32]]] = [{} for _ in policies]
    needs = [base, *(folder for folder, _ in policies)]
    arguments = str(base), dtype, load_in_4bit, fact
    for row in map_on_actors(ray, config, stage, rows, PolicyReader, *arguments, needs=needs):
        number, members = batches[int(row["batch"])]
        values = np.frombuffer(row["found"], dtype=np.float32).reshape(len(members), -1)
        found[number] |= dict(zip(members.tolist(), values, strict=True))
        bar.advance(len(members))
    return [
        np.stack([of_policy[row] for row in wanted.tolist()])
        for of_policy, (_, wanted) in zip(found, policies, strict=True)
    ]
