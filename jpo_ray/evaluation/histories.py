"""What a `trainer_state.json` says: curves over steps and the values a run ended with. Any key may be missing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_POINTS = 120  # of a curve: more cannot be told apart on a chart a few hundred pixels wide

Log = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Curve:
    """Values over optimizer steps; empty where nothing was logged."""

    steps: list[float]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def last(self) -> float | None:
        return self.values[-1] if self.values else None


def curve(log: Log, key: str) -> Curve:
    """The finite values logged under `key`, by step."""
    points = [(entry.get("step"), entry.get(key)) for entry in log]
    kept = [(float(x), float(y)) for x, y in points if _finite(x) and _finite(y)]  # type: ignore[arg-type]
    kept.sort(key=lambda point: point[0])
    return Curve([step for step, _ in kept], [value for _, value in kept])


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def averaged(curve: Curve, max_points: int = MAX_POINTS) -> Curve:
    """Means over windows of consecutive entries, so that at most `max_points` are left."""
    size = math.ceil(len(curve.steps) / max_points) or 1
    starts = range(0, len(curve.steps), size)
    return Curve(
        [_mean(curve.steps[start : start + size]) for start in starts],
        [_mean(curve.values[start : start + size]) for start in starts],
    )


def final_values(log: Log) -> dict[str, float | None]:
    """The values a training ended with, on validation where it was evaluated, else the mean of its last tenth."""

    def final(key: str) -> float | None:
        validation = curve(log, f"eval_{key}").last
        return _tail_mean(curve(log, key)) if validation is None else validation

    instruction, response = final("joint/margin_instruction"), final("joint/margin_response")
    return {
        "train_loss": _tail_mean(curve(log, "loss")),
        "eval_loss": curve(log, "eval_loss").last,
        "accuracy": final("rewards/accuracies"),
        "accuracy_conditional": final("joint/accuracy_conditional"),
        "accuracy_joint": final("joint/accuracy_joint"),
        "margin": final("rewards/margins"),
        "margin_instruction": instruction,
        "margin_response": response,
        "instruction_share": _share(instruction, response),
        "tokens_per_second": _mean_or_none(curve(log, "tokens_per_second").values),
    }


def _share(instruction: float | None, response: float | None) -> float | None:
    """Instruction part of the margin in percent; None where the parts pull apart, since no share describes that."""
    if instruction is None or response is None or min(instruction, response) < 0 or instruction + response == 0:
        return None
    return 100 * instruction / (instruction + response)


def _tail_mean(curve: Curve) -> float | None:
    return _mean_or_none(curve.values[-max(1, len(curve.values) // 10) :])


def _mean_or_none(values: list[float]) -> float | None:
    return _mean(values) if values else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
