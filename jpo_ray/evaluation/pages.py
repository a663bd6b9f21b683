"""What all pages share: rendering a template, writing it, and how numbers are written."""

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpo_ray.evaluation.win_rates import interval_text

NONE = "–"  # stands where there is no number


def write_page(path: Path, page: str) -> None:
    """Aside, then in place."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    staged.write_text(page, encoding="utf-8", errors="replace")  # lone surrogates are no text
    staged.replace(path)


def render(template: str, context: Mapping[str, Any]) -> str:
    """A page of this folder, with the filters number, interval and duration."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number_text, "percent": percent, "interval": interval, "duration": duration_text
    }  # fmt: skip
    return environment.get_template(template).render(context)


def light_colors() -> dict[str, str]:
    """The pages' colours by the names of their CSS variables, in light mode."""
    style = (Path(__file__).parent / "report_style.html").read_text(encoding="utf-8")
    return dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+);", style[: style.index("@media")]))


def number_text(value: float | None, form: str = ",.1f") -> str:
    """A number, or a dash where there is none."""
    return NONE if value is None else format(value, form)


def percent(share: float | None) -> str:
    """A share in percent, or a dash."""
    return number_text(None if share is None else 100 * share)


def interval(ends: list[float | None] | None, form: str = ".1f") -> str:
    """`low to high`, or a dash where there is no interval."""
    text = interval_text(ends or [None, None], form)
    return NONE if text == "-" else text


def duration_text(seconds: float) -> str:
    """Seconds as people say them: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"
