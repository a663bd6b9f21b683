"""The analysis of judgments as a page and as numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpo_ray.evaluation.pages import render, write_page
from jpo_ray.evaluation.panels import interplay_charts
from jpo_ray.feedback.analysis import SHOWN
from jpo_ray.files import write_json


def write_analysis(found: Mapping[str, Any], out: Path) -> None:
    """`analysis.json` and `index.html` in the folder `out`."""
    write_json(out / "analysis.json", dict(found))
    write_page(out / "index.html", render("analysis.html", {**found, **interplay_charts(found), "cells": SHOWN}))
