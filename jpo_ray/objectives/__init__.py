"""Objectives: pure functions of per-item quantities and edges.

`LOSSES` has them by name; what each takes from the config and needs of the data stands in `config_objective.py`.
"""

from collections.abc import Callable

from jpo_ray.objectives.groups import lipo, pro, rpo
from jpo_ray.objectives.losses import Edges, Items, ItemScores, Outcome, concatenated, dpo, jpo, mixture, sft
from jpo_ray.objectives.margins import cdpo, dpop, ipo, odpo, rdpo, robust, slic
from jpo_ray.objectives.reference_free import chosen_nll, orpo, simpo
from jpo_ray.objectives.targets import apo_down, apo_zero, kto, sppo

# name -> loss(items, edges, *, beta and further parameters)
LOSSES: dict[str, Callable[..., Outcome]] = {
    "jpo": jpo,
    "dpo": dpo,
    "cdpo": cdpo,
    "robust": robust,
    "ipo": ipo,
    "slic": slic,
    "dpop": dpop,
    "odpo": odpo,
    "rdpo": rdpo,
    "kto": kto,
    "sppo": sppo,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "simpo": simpo,
    "orpo": orpo,
    "sft": chosen_nll,
    "lipo": lipo,
    "pro": pro,
    "rpo": rpo,
}

__all__ = ["LOSSES", "Edges", "ItemScores", "Items", "Outcome", "concatenated", "mixture", "sft"]
