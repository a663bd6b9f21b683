"""What trained policies do to held-out preferences and to their own samples, beyond who wins.

Implicit rewards are beta * log-ratio of policy and reference (DPO, arXiv 2305.18290; of the whole sequence for joint
comparisons, JPO paper, Eq. 1). That they rank a comparison right does not mean that the policy itself prefers the
chosen response (arXiv 2405.19534), and both can rank right while the chosen response grows less likely, which is
likelihood displacement (arXiv 2410.08847): so all three are counted.

Shape suffixes: N items, E comparisons, S samples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

INSTRUCTION, RESPONSE = 0, 1  # columns of log-probs
DISTINCT = (1, 2)  # n of distinct-n


def preference_metrics(
    ratio_N2: Floats, reference_N2: Floats, chosen_E: Ints, rejected_E: Ints, joint_E: Bools
) -> dict[str, Any]:
    """Of one policy on held-out comparisons of items; shares are of comparisons, log-probs in nats.

    `accuracy_conditional`, `accuracy_joint`: comparisons whose implicit rewards are in the right order.
    `ranking_accuracy`, `reference_ranking_accuracy`: conditional ones whose chosen response is the likelier one, under
    policy and reference. `chosen_log_ratio`, `rejected_log_ratio`: mean change of the responses' log-probs in
    conditional comparisons; `displaced_share`: how often the chosen response's fell; `displacement`: whether it falls
    on average. None where there is no such comparison.
    """
    whole_N = ratio_N2.sum(axis=1)
    cond_E = ~joint_E
    # With equal instructions their terms cancel, but for rounding.
    margin_E = np.where(
        joint_E, whole_N[chosen_E] - whole_N[rejected_E], ratio_N2[chosen_E, RESPONSE] - ratio_N2[rejected_E, RESPONSE]
    )
    reference_N, policy_N = reference_N2[:, RESPONSE], reference_N2[:, RESPONSE] + ratio_N2[:, RESPONSE]
    chosen, rejected = chosen_E[cond_E], rejected_E[cond_E]
    change = _mean(ratio_N2[chosen, RESPONSE])
    return {
        "conditional": int(cond_E.sum()),
        "joint": int(joint_E.sum()),
        "accuracy_conditional": _mean(margin_E[cond_E] > 0),
        "accuracy_joint": _mean(margin_E[joint_E] > 0),
        "ranking_accuracy": _mean(policy_N[chosen] > policy_N[rejected]),
        "reference_ranking_accuracy": _mean(reference_N[chosen] > reference_N[rejected]),
        "chosen_log_ratio": change,
        "rejected_log_ratio": _mean(ratio_N2[rejected, RESPONSE]),
        "displaced_share": _mean(ratio_N2[chosen, RESPONSE] < 0),
        "displacement": None if change is None else change < 0,
    }


def kl_of_samples(log_ratio_S: Floats, instruction_S: Sequence[str]) -> dict[str, Any]:
    """KL divergence of policy from reference, in nats a response, by the policy's own samples at temperature 1.

    The mean log-ratio of the samples, and its 95 % interval by the normal approximation, samples of one instruction
    being one piece of evidence.
    """
    if not len(log_ratio_S):
        return {"kl": None, "kl_ci95": [None, None], "kl_samples": 0}
    mean = float(log_ratio_S.mean())
    _, cluster_S = np.unique(np.array(instruction_S), return_inverse=True)
    error = float(np.sqrt((np.bincount(cluster_S, log_ratio_S - mean) ** 2).sum()) / len(log_ratio_S))
    return {"kl": mean, "kl_ci95": [mean - 1.96 * error, mean + 1.96 * error], "kl_samples": len(log_ratio_S)}


def sample_metrics(responses: Sequence[str]) -> dict[str, float | None]:
    """Mean characters and words of samples, and distinct-n: the share of different n-grams (arXiv 1510.03055)."""
    words = [response.split() for response in responses]
    found: dict[str, float | None] = {
        "characters": _mean(np.array([len(response) for response in responses])),
        "words": _mean(np.array([len(each) for each in words])),
    }
    for n in DISTINCT:
        grams = [tuple(each[place : place + n]) for each in words for place in range(len(each) - n + 1)]
        found[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else None
    return found


def _mean(values: npt.NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None
