"""The table of `docs/objectives.md` has every objective with its source, its keys and their defaults."""

import re
from pathlib import Path

import pytest

from jpo_ray.config_objective import OBJECTIVES
from jpo_ray.objectives import LOSSES

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
ROWS = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `") and "`objective`" not in line}


def test_the_table_has_all_objectives() -> None:
    assert ROWS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_row_says_what_the_config_takes(name: str) -> None:
    keys, needs, joint = (cell.strip() for cell in ROWS[name].replace("\\|", "").split("|")[4:7])
    objective = OBJECTIVES[name]
    for key, default in objective.keys.items():
        assert key == "beta" or f"`{key}`" in keys
        assert f"{default:g}" in keys or (key, default) == ("beta", 0.1)
    assert ("reference" in needs) == ("reference" in objective.reads)
    assert ("gaps" in needs, "embeddings" in needs) == ("gap" in objective.reads, "embedding" in objective.reads)
    assert joint.startswith("no" if objective.conditional_only else "yes")


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_row_and_its_docstring_name_the_same_source(name: str) -> None:
    """Paper, equation where there is a number, and code that it was checked against."""
    row, said = ROWS[name].split("|")[2], LOSSES[name].__doc__ or ""
    assert set(re.findall(r"/abs/(\d+\.\d+)", row)) <= set(re.findall(r"arXiv (\d+\.\d+)", said))
    shown, told = re.search(r"Eq\. ([\d., ]+)", row), re.search(r"Equations? ([\d., and]+)", said)
    assert _numbers(shown) == _numbers(told)
    assert "unchecked" not in said


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("odpo", "rycolab/odpo"),
        ("rpo", "yinyueqin/relative-preference-optimization"),
        ("pro", "AlibabaResearch/DAMO-ConvAI"),
        ("robust", "TRL"),
    ],
)
def test_what_a_loss_was_checked_against_is_said(name: str, code: str) -> None:
    assert re.search(rf"[Cc]hecked against .*{code}", LOSSES[name].__doc__ or "", re.S)
    assert code in PAGE


def _numbers(found: re.Match[str] | None) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", found[1]) if found else []
