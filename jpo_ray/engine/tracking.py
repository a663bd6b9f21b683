"""Trackers: TensorBoard and Weights & Biases, each model's metrics under the names that TRL's runs have there.

`loss` of a log entry is `train/loss`, `eval_loss` is `eval/loss`, `test_win_rate/mean` is `test/win_rate/mean`.
"""

import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jpo_ray.errors import InputError

TENSORBOARD, WANDB = "tensorboard", "wandb"
PROJECT = "jpo-ray"  # at Weights & Biases, where WANDB_PROJECT names no other
FINISH_S = 60.0  # longest wait for an upload when a training ends; what is not sent stays on disk for `wandb sync`
LOGS = "logs"  # in the run directory
PREFIXES = ("eval", "test")  # of keys; all others are training's

Entry = Mapping[str, Any]  # `step`, and metrics by name
Write = Callable[[Entry], None]


@dataclass(frozen=True)
class Tracking:
    """Where the metrics of one model go."""

    report_to: tuple[str, ...]
    run: Path  # the run directory
    name: str  # sft, jpo, jpo/evaluate, ...
    key: str  # the same where a training goes on, another where it starts anew
    about: Mapping[str, Any] = field(default_factory=dict)  # the config that Weights & Biases shows

    @property
    def folder(self) -> Path:
        return self.run / LOGS / self.name


def trackers_of(report_to: Sequence[str]) -> tuple[str, ...]:
    """The trackers meant by `report_to`: `all` stands for those that are installed."""
    named = set(report_to)
    if "all" in named:
        named |= {TENSORBOARD} | ({WANDB} if _has_wandb() else set())
    return tuple(name for name in (TENSORBOARD, WANDB) if name in named)


def check_trackers(report_to: Sequence[str], *, here: bool) -> None:
    """Raise `InputError` where Weights & Biases is asked for and cannot be had. `here`: this machine runs the work."""
    if WANDB not in trackers_of(report_to):
        return
    wandb = _wandb_package()
    online = os.environ.get("WANDB_MODE", "online") == "online"
    if here and online and not wandb.login(prompt=False):
        raise InputError(
            "report_to: Weights & Biases has no key; run `wandb login`, or set WANDB_API_KEY, WANDB_MODE=offline or "
            "report_to=tensorboard"
        )


@contextmanager
def tracked(tracking: Tracking | None, history: Sequence[Entry]) -> Iterator[Write]:
    """What hands a log entry to the trackers; `history` is what the log holds already.

    Files of an earlier attempt give way to new ones that begin with the history, so what was logged after the
    checkpoint from which a training goes on does not stand there twice.
    """
    with ExitStack() as stack:
        opened: list[Write] = []
        if tracking is not None and tracking.report_to:
            shutil.rmtree(tracking.folder, ignore_errors=True)
            tracking.folder.mkdir(parents=True, exist_ok=True)
            opened = [stack.enter_context(_TRACKERS[name](tracking)) for name in tracking.report_to]

        def write(entry: Entry) -> None:
            for each in opened:
                each(entry)

        for entry in history:
            write(entry)
        yield write


def _metrics(entry: Entry) -> dict[str, float]:
    """By the trackers' names."""
    found = {}
    for name, value in entry.items():
        prefix = next((each for each in PREFIXES if name.startswith(f"{each}_")), None)
        if name != "step" and value is not None:
            found[f"{prefix}/{name.removeprefix(f'{prefix}_')}" if prefix else f"train/{name}"] = float(value)
    return found


@contextmanager
def _tensorboard(tracking: Tracking) -> Iterator[Write]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(logdir=str(tracking.folder))

    def write(entry: Entry) -> None:
        for name, value in _metrics(entry).items():
            writer.add_scalar(name, value, entry["step"])
        writer.flush()

    try:
        yield write
    finally:
        writer.close()


@contextmanager
def _wandb(tracking: Tracking) -> Iterator[Write]:
    wandb = _wandb_package()
    run = tracking.run.name
    identity = hashlib.sha256(f"{tracking.folder.resolve()} {tracking.key}".encode()).hexdigest()[:16]
    try:
        logged = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            group=run,
            name=f"{run}/{tracking.name}",
            id=identity,
            resume="allow",
            dir=str(tracking.folder),
            config=dict(tracking.about),
            settings=wandb.Settings(silent=True, finish_timeout=FINISH_S),
        )
    except wandb.errors.Error as error:
        raise InputError(
            f"report_to: Weights & Biases cannot be reached ({error}); mend it, or leave wandb out"
        ) from error
    known = logged.step  # a run that goes on has what comes before

    def write(entry: Entry) -> None:
        if entry["step"] >= known:
            logged.log(_metrics(entry), step=entry["step"])

    failed = True
    try:
        yield write
        failed = False
    finally:
        logged.finish(exit_code=int(failed))


_TRACKERS = {TENSORBOARD: _tensorboard, WANDB: _wandb}


def _has_wandb() -> bool:
    return importlib.util.find_spec("wandb") is not None


def _wandb_package() -> Any:
    if not _has_wandb():
        raise InputError("report_to: wandb is not installed; `pip install wandb`, or set report_to=tensorboard")
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    return wandb
