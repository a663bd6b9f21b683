"""What is counted of policies, by hand."""

import numpy as np
import pytest

from jpo_ray.evaluation.policy_metrics import kl_of_samples, preference_metrics, sample_metrics

# Log-ratios (instruction, response) of four items, and log-probs under the reference.
RATIO = np.array([[9.0, -1.0], [9.0, -3.0], [0.5, 1.0], [2.0, -1.0]])
REFERENCE = np.array([[-5.0, -10.0], [-5.0, -9.0], [-5.0, -20.0], [-5.0, -12.0]])


def test_accuracies_rankings_and_displacement() -> None:
    """Conditional 0 > 1 and 2 > 3, joint 2 > 0 and 0 > 3. Under the policy responses have -11, -12, -19, -13."""
    chosen, rejected = np.array([0, 2, 2, 0]), np.array([1, 3, 0, 3])
    found = preference_metrics(RATIO, REFERENCE, chosen, rejected, np.array([False, False, True, True]))
    assert found == {
        "conditional": 2,
        "joint": 2,
        "accuracy_conditional": 1.0,  # margins 2 and 2
        "accuracy_joint": 0.5,  # whole sequences: 1.5 against 8 is wrong, 8 against 1 is right
        "ranking_accuracy": 0.5,  # -11 against -12 is right, -19 against -13 wrong
        "reference_ranking_accuracy": 0.0,
        "chosen_log_ratio": 0.0,
        "rejected_log_ratio": -2.0,
        "displaced_share": 0.5,
        "displacement": False,
    }


def test_margins_grow_although_the_chosen_response_grows_less_likely() -> None:
    found = preference_metrics(RATIO, REFERENCE, np.array([0]), np.array([1]), np.array([False]))
    assert (found["accuracy_conditional"], found["displacement"], found["accuracy_joint"]) == (1.0, True, None)


def test_nothing_held_out_is_none() -> None:
    nothing = np.array([], dtype=np.int64)
    found = preference_metrics(RATIO, REFERENCE, nothing, nothing, np.array([], dtype=bool))
    assert (found["conditional"], found["accuracy_conditional"], found["displacement"]) == (0, None, None)


def test_kl_is_the_mean_log_ratio_of_samples() -> None:
    """Of a policy N(1, 1) and a reference N(0, 1) it is 1/2."""
    drawn = np.random.default_rng(0).normal(1.0, 1.0, 4000)
    found = kl_of_samples(drawn - 0.5, [str(number) for number in range(4000)])
    low, high = found["kl_ci95"]
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(4000), rel=0.05)
    assert kl_of_samples(np.array([]), [])["kl"] is None
    four = kl_of_samples(np.repeat(drawn[:1000] - 0.5, 4), [str(number // 4) for number in range(4000)])
    low, high = four["kl_ci95"]
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(1000), rel=0.1)  # the same sample four times is one


def test_lengths_and_distinct_n() -> None:
    found = sample_metrics(["a b a b", "a b"])
    assert found == {"characters": 5.0, "words": 3.0, "distinct_1": 2 / 6, "distinct_2": 2 / 4}
    assert sample_metrics(["one"])["distinct_2"] is None
    assert sample_metrics([])["words"] is None
