"""Curves and final values from logs in which anything may be missing."""

import math

import pytest

from jpo_ray.evaluation.histories import averaged, curve, final_values


def test_curve_skips_what_is_no_number() -> None:
    log = [
        {"step": 2, "loss": 0.5},
        {"step": 1, "loss": 1},
        {"step": 3, "loss": math.nan},
        {"step": 4, "loss": "0.2"},
        {"loss": 0.1},
        {"step": 5, "eval_loss": 0.3},
    ]
    assert (curve(log, "loss").steps, curve(log, "loss").values) == ([1.0, 2.0], [1.0, 0.5])
    assert not curve([], "loss")
    assert curve([], "loss").last is None


def test_averaged_takes_means_of_windows() -> None:
    log = [{"step": step, "loss": float(step)} for step in range(1, 6)]
    halved = averaged(curve(log, "loss"), max_points=3)
    assert (halved.steps, halved.values) == ([1.5, 3.5, 5.0], [1.5, 3.5, 5.0])
    assert averaged(curve([], "loss")).values == []


def test_final_values_prefer_validation() -> None:
    log = [{"step": step, "loss": 1.0, "rewards/accuracies": 0.5} for step in range(1, 21)]
    log += [{"step": 21, "loss": 0.4, "rewards/accuracies": 0.9}, {"step": 21, "eval_rewards/accuracies": 0.7}]
    values = final_values(log)
    assert values["train_loss"] == pytest.approx(0.7)  # the last 2 of 21 entries
    assert values["accuracy"] == 0.7
    assert values["eval_loss"] is None
    assert values["instruction_share"] is None


@pytest.mark.parametrize(
    ("instruction", "response", "share"), [(1.0, 3.0, 25.0), (0.0, 2.0, 0.0), (-0.5, 2.0, None), (0.0, 0.0, None)]
)
def test_instruction_share(instruction: float, response: float, share: float | None) -> None:
    log = [{"step": 1, "joint/margin_instruction": instruction, "joint/margin_response": response}]
    assert final_values(log)["instruction_share"] == share
