"""What a trained policy says of items, in an actor pool: implicit rewards, or embeddings of responses."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from jpo_ray.cluster.reference import PASS_TOKENS, packed_rows, unpacked
from jpo_ray.cluster.session import map_on_actors
from jpo_ray.config import ClusterConfig
from jpo_ray.data.tokens import TokenizedItems
from jpo_ray.engine.micro_batches import micro_batches
from jpo_ray.engine.model import load_adapter
from jpo_ray.engine.scoring import make_scorer, response_embeddings, score_items

Fact = Literal["reward", "embedding"]


class PolicyReader:
    """Actor; a row is one micro-batch."""

    def __init__(self, adapter: str, dtype: str, load_in_4bit: bool, fact: Fact, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        model = load_adapter(Path(adapter), dtype=dtype, load_in_4bit=load_in_4bit, device=device)
        self.model, self.scorer, self.fact = model, make_scorer(model), fact

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = [self.read(*unpacked(batch, row)) for row in range(len(batch["batch"]))]
        return {"batch": batch["batch"], "found": [values.tobytes() for values in found]}

    def read(self, tokens: TokenizedItems, rows: range) -> npt.NDArray[np.float32]:
        """Log-ratio of policy and reference, float32[n, 1] in nats, or embeddings, float32[n, D]."""
        import torch

        with torch.no_grad():
            if self.fact == "embedding":
                return response_embeddings(self.scorer, tokens, rows).cpu().numpy()
            scores = score_items(self.scorer, tokens, rows)
            with self.model.disable_adapter():
                scores = scores - score_items(self.scorer, tokens, rows)
            return scores.sum(dim=1, keepdim=True).float().cpu().numpy()


def policy_facts(
    ray: Any,
    config: ClusterConfig,
    tokens: TokenizedItems,
    *,
    adapter: Path,
    dtype: str,
    load_in_4bit: bool,
    fact: Fact,
    bar: Any,
) -> npt.NDArray[np.float32]:
    """Of every row of `tokens`: its log-ratio of policy and reference, float32[rows, 1], or embedding, [rows, D]."""
    batches = micro_batches(tokens, np.arange(len(tokens)), PASS_TOKENS, packed=True)
    rows, arguments = packed_rows(tokens, batches), (str(adapter), dtype, load_in_4bit, fact)
    bar.begin(len(tokens))
    found: dict[int, npt.NDArray[np.float32]] = {}
    for row in map_on_actors(ray, config, "judge", rows, PolicyReader, *arguments):
        members = batches[row["batch"]]
        values = np.frombuffer(row["found"], dtype=np.float32).reshape(len(members), -1)
        found |= dict(zip(members.tolist(), values, strict=True))
        bar.advance(len(members))
    return np.stack([found[row] for row in range(len(tokens))])
