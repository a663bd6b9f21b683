"""The miniature of the paper: claims by hand, and the page that is written of them."""

import json
import re
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from miniature.claims import Claim, Found, all_claims, higher
from miniature.document import write_document

from jpo_ray.evaluation.experiment_results import Measured, groups_of

VERDICTS = {"w": "a", "l": "b", "t": "tie"}
RATES = {1e-5: "wl" * 40, 5e-5: "wwwl" * 20, 5e-4: "l" * 80}
OBJECTIVES = ("sft", "dpo", "dpo-comparisons", "kto", "kto-comparisons", "jpo")


def measured(entry: str, letters: str, seed: int = 0, **settings: object) -> Measured:
    rows = [
        {"instruction_id": str(n), "model": entry, "temperature": 0.001, "verdict": VERDICTS[letter]}
        for n, letter in enumerate(letters)
    ]
    return Measured(entry, settings, str(seed), pa.Table.from_pylist(rows))


def experiment(*found: Measured) -> Found:
    return Found(found, groups_of(found, 100, 0), 90.0)


def test_a_claim_is_judged_by_the_interval_of_the_difference() -> None:
    good, bad, near = measured("jpo", "w" * 60), measured("sft", "wl" * 30), measured("dpo", "wl" * 29 + "ww")
    assert higher("", "", [good], [bad]).verdict == "agrees"
    assert higher("", "", [bad], [good]).verdict == "disagrees"
    unsure = higher("", "", [near], [bad])
    assert (unsure.verdict, unsure.here[:5]) == ("not told apart", "+1.7 ")  # one of 60


@pytest.fixture
def found() -> dict[str, Found]:
    """JPO wins 75 percent, all else half; the sweep and the like have one group."""
    half, most = "wl" * 40, "wwwl" * 20
    main = experiment(*(measured(entry, most if entry == "jpo" else half) for entry in OBJECTIVES))
    sizes = [
        measured("jpo", letters, max_train_comparisons=size)
        for size, letters in ((100, half), (300, most), (900, most))
    ]
    return {
        "objectives": main,
        "data_scaling": experiment(measured("sft", half), *sizes),
        "protocols": experiment(*(measured(e, half) for e in ("sft", "conditional", "joint", "both-half", "both"))),
        "sweep": experiment(*(measured("jpo", of, learning_rate=r, beta=0.1) for r, of in RATES.items())),
        **{name: experiment(measured("jpo", most)) for name in ("strategies", "bands", "selection")},
    }


def test_every_comparison_of_the_paper_has_its_line(found: dict[str, Found]) -> None:
    claims = {claim.says: claim for claim in all_claims(found)}
    assert len(claims) == 11
    assert claims["A learning rate of 5e-5 beats one of 5e-4 (the best of three there; beta 0.1)"].here[:5] == "+75.0"
    verdicts = {says: claim.verdict for says, claim in claims.items()}
    assert verdicts["JPO beats SFT (Table 5)"] == verdicts["JPO beats DPO at equal epochs (Table 5)"] == "agrees"
    assert (
        verdicts["DPO beats SFT (Table 5)"] == verdicts["Joint comparisons alone align (Figure 5)"] == "not told apart"
    )
    assert claims["More comparisons help (Figure 7)"].here.startswith("+25.0 (")
    assert all(isinstance(claim, Claim) and claim.paper for claim in claims.values())


def test_the_page_has_the_numbers(found: dict[str, Found], tmp_path: Path) -> None:
    run = main_run(tmp_path / "run")
    write_document(found, run, tmp_path / "docs")
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "| JPO | 75.0 | **75.0** | " in page
    assert "| 61.0 (60.0 to 62.0) | 80 | 0 |\n" in page  # length-controlled, n, invalid
    assert "| JPO | 50.0 (45.0 to 55.0) | 50.0 (45.0 to 55.0) |\n" in page
    assert "agrees with 6, cannot tell 5 and disagrees with 0" in page
    highest = "The highest rate here, 75.0, is that of learning_rate 5e-05, beta 0.1: told apart from 2 of 2 others."
    assert highest in page
    assert "in 10 minutes (objectives 2, data_scaling 2" in page
    assert "Here: within 1 point of its last value from 300 on." in page
    assert "| joint | 0.95 | 0.80 |\n| conditional | 0.95 | 0.70 |\n| both | 0.95 | 0.90 |\n" in page
    assert "| JPO | 80.0 | 0.50 |" in page
    assert "Seeds: 0." in page
    figures = [path.name for path in (tmp_path / "docs" / "figures").iterdir()]
    assert sorted(re.findall(r"\(figures/(.*?)\)", page)) == sorted(figures)
    assert len(figures) == 1 + 6  # Table 5, and a figure for each other experiment
    curve = (tmp_path / "docs" / "figures" / "results-data_scaling.svg").read_text()
    assert "the paper, TL;DR" in curve
    assert "var(" not in curve
    assert "None" not in page
    assert "{" not in page


def main_run(folder: Path) -> Path:
    """What the page takes from the run of the objectives."""
    models = {entry: {"length_controlled": {"rate": 61.0, "ci95": [60.0, 62.0]}} for entry in OBJECTIVES}
    rates = {entry: {"win_rate": 50.0, "win_rate_ci95": [45.0, 55.0]} for entry in OBJECTIVES}
    files = {
        "evaluate/win_rates.json": {"models": models},
        "tournament/tournament.json": {
            "ranking": {source: {"n": 1200, "models": rates} for source in ("joint", "conditional", "both")},
            "agreement": {
                source: {"models": 6, "kendall_tau": tau, "pearson": 0.95}
                for source, tau in (("joint", 0.8), ("conditional", 0.7), ("both", 0.9))
            },
        },
        "policies/policies.json": {
            entry: {"words": 7.0} | ({} if entry == "sft" else {"accuracy_conditional": 0.8, "kl": 0.5})
            for entry in OBJECTIVES
        },
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    return folder


def test_the_time_is_that_of_all_attempts_that_made_something(tmp_path: Path) -> None:
    """Stopped, killed, finished and shown again."""
    import paper

    def attempt(*, makes: bool, error: type[BaseException] | None = None) -> float:
        before = paper._seconds(tmp_path) or 0.0
        with suppress(KeyboardInterrupt), paper._timed(tmp_path):
            if makes:
                folder = tmp_path / "run" / f"stage{len(list(tmp_path.glob('run/*')))}"
                folder.mkdir(parents=True)
                (folder / "manifest.json").write_text("{}")
            time.sleep(0.05)
            if error is not None:
                raise error
        return float(paper._seconds(tmp_path) or 0.0) - before

    assert paper._seconds(tmp_path) is None
    assert attempt(makes=True, error=KeyboardInterrupt) >= 0.05
    assert attempt(makes=True) >= 0.05
    assert attempt(makes=False) == 0
    killed = paper._seconds(tmp_path)
    last = (tmp_path / "run" / "stage1" / "manifest.json").stat().st_mtime
    (tmp_path / "seconds.json").write_text(json.dumps({"seconds": killed, "begun": last - 7.0}))
    assert attempt(makes=False) == pytest.approx(7.0, abs=1e-3)
