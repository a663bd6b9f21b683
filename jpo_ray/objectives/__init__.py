"""Objectives: pure functions of per-item quantities and edges.

Shape suffixes: `_N` over the items of a batch, `_E` over its edges (comparisons), `_K` over mismatched items.
"""

from jpo_ray.objectives.losses import Edges, ItemScores, Outcome, dpo, jpo, kto, log_ratios, sft

__all__ = ["Edges", "ItemScores", "Outcome", "dpo", "jpo", "kto", "log_ratios", "sft"]
