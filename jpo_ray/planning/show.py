"""A plan as text of 80 columns."""

import textwrap
from collections.abc import Iterator, Sequence

from jpo_ray.planning.costs import StageCost
from jpo_ray.planning.plan import Plan
from jpo_ray.planning.workers import JUDGING

WIDTH = 80


def number(value: float | None, unknown: str = "?") -> str:
    """`1,234`, from a hundred thousand on in short: `123k`, `4.5M`, `6.7G`."""
    if value is None:
        return unknown
    if abs(value) < 1e5:
        return f"{value:,.0f}"
    for limit, unit in ((1e6, "k"), (1e9, "M"), (1e12, "G")):
        if abs(value) < limit:
            scaled = value / (limit / 1e3)
            return f"{scaled:.3g}{unit}" if scaled < 999.5 else f"{scaled:.0f}{unit}"
    return f"{value / 1e12:.3g}T"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for limit, size, unit in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if seconds / size >= 9.95 else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86_400:.1f} d"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> Iterator[str]:
    """The first column on the left, the others on the right."""
    for first, *rest in (header, *rows):
        cells = (f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True))
        yield f"{first:<{widths[0]}}" + "".join(cells)


def listed(lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        yield from textwrap.wrap(
            line, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
        )


def plan_lines(plan: Plan, title: str) -> Iterator[str]:
    """The whole of it, for a terminal or a log."""
    yield from textwrap.wrap(f"Plan of {title}; nothing was downloaded or started", WIDTH)
    yield from textwrap.wrap(f"Model: {plan.model}, {number(plan.parameters)} parameters", WIDTH)
    for part in (_data(plan), _judging(plan), _stages(plan)):
        yield ""
        yield from part
    for heading, lines in (("ASSUMED", plan.assumed), ("MISSING on this machine", plan.missing)):
        yield ""
        yield heading if lines else f"{heading}: nothing"
        yield from listed(lines)


def _data(plan: Plan) -> Iterator[str]:
    counts = plan.counts
    rows = [
        (name, *map(number, (split.instructions, split.items, split.conditional, split.joint)), split.origin)
        for name, split in counts.splits.items()
    ]
    yield from table(("DATA", "instructions", "items", "conditional", "joint", "from"), rows, (12, 14, 10, 13, 10, 18))
    yield f"fine-tuning on {number(counts.fine_tuning)} items" if plan.fine_tunes else "no fine-tuning"
    instruction, response = counts.tokens.instruction, counts.tokens.response
    if instruction is not None and response is not None:
        yield f"tokens of an item: {instruction:.0f} of instruction, {response:.0f} of response"


def _judging(plan: Plan) -> Iterator[str]:
    rows = [
        (
            cost.stage, cost.annotator[:23], *map(number, (cost.comparisons, cost.requests, cost.tokens)),
            "?" if cost.cost is None else f"{cost.cost:,.2f}",
        )
        for cost in plan.judging
    ]  # fmt: skip
    header = ("JUDGING", "by", "comparisons", "requests", "tokens", "US dollars")
    yield from table(header, rows, (11, 24, 13, 10, 9, 12))
    hours = [cost.hours for cost in plan.judging if cost.hours]
    if hours:
        yield f"at least {duration(3600 * sum(hours))} by requests_per_minute"
    conditional, joint = (number(plan.counts.preferences[protocol]) for protocol in ("conditional", "joint"))
    yield f"decisive training comparisons: {conditional} conditional, {joint} joint"


def _stages(plan: Plan) -> Iterator[str]:
    header = ("STAGE", "steps", "items", "tokens", "trained", "GiB" if plan.on_cpu else "GiB/GPU", "time")
    yield from table(header, list(map(_stage, plan.stages)), (22, 9, 10, 10, 10, 9, 10))
    timed = [cost.seconds for cost in plan.stages if cost.stage not in JUDGING]
    known = [seconds for seconds in timed if seconds is not None]
    together = duration(sum(known)) if len(known) == len(timed) else "?"
    yield f"together {together}; judging, embedding and starting engines come on top"
    whole = plan.run_dir_gib is not None and plan.run_dir_gib >= 1000
    disk = (
        [f"about {plan.run_dir_gib:{',.0f' if whole else '.3g'}} GiB for the run directory"] if plan.run_dir_gib else []
    )
    disk += [f"{plan.hub_gib:.3g} GiB of models to download"] if plan.hub_gib else []
    if disk:
        yield f"disk: {', '.join(disk)}"
    if plan.host_memory_gib:
        yield f"host memory: {plan.host_memory_gib:.0f} GiB of all workers while the sharded model is loaded"


def _stage(cost: StageCost) -> Sequence[str]:
    """Of judges their memory alone: what they are asked stands under JUDGING."""
    memory = "?" if cost.memory_gib is None else f"{cost.memory_gib:.1f}"
    if cost.stage in JUDGING:
        return cost.name, "-", "-", "-", "-", memory, "-"
    numbers = (number(cost.items), number(cost.tokens), number(cost.trained, "-"))
    return cost.name[:20], number(cost.steps, "-"), *numbers, memory, duration(cost.seconds)
