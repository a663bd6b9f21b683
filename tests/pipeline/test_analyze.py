"""`jpo analyze` on a small run that several annotators judged."""

import json
from pathlib import Path

import pytest

from jpo_ray import records
from jpo_ray.cli import main
from jpo_ray.config_file import parse_config
from jpo_ray.errors import InputError
from jpo_ray.evaluation.run_judgments import short_names
from pipeline.inline import install, run, small_config

ALSO = [
    {"annotator": "sandbox", "name": "ann", "noise": 0.3, "tie_band": 0.05},
    {"annotator": "sandbox", "name": "bob", "noise": 0.3, "tie_band": 0.2},
]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analyze") / "run"
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        judge = {"annotator": "sandbox", "noise": 0.05, "tie_band": 0.05, "also": ALSO}
        run(small_config(judge=judge), folder, ["items", "pairs", "judge"])
    return folder


def test_annotators_are_kept_apart_and_preferences_are_the_first_ones(judged: Path) -> None:
    rows = records.read_table(judged / "judge" / "judgments.parquet", records.JUDGMENTS).to_pylist()
    names = [row["annotator"] for row in rows]
    assert {name: names.count(name) for name in names} == dict.fromkeys(["sandbox", "ann", "bob"], len(rows) // 3)
    first = [row for row in rows if row["annotator"] == "sandbox" and row["verdict"] in ("a", "b")]
    preferences = records.read_table(judged / "judge" / "preferences.parquet", records.PREFERENCES)
    assert len(preferences) == len(first)


def test_the_tables_are_printed_and_written(judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["analyze", "--run-dir", str(judged), "--out", str(tmp_path / "found"), "--people", "ann", "bob"]
    assert main([*arguments, "--list", "C > R"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "found" / "analysis.json").read_text())
    assert found["annotators"] == ["sandbox", "ann", "bob"]
    between = {(row["one"], row["other"], row["protocol"]): row["score"] for row in found["agreements"]}
    assert set(between) == {
        (*pair, protocol)
        for pair in (("sandbox", "ann"), ("sandbox", "bob"), ("ann", "bob"), ("sandbox", "people"))
        for protocol in records.PROTOCOLS
    }
    assert all(60 < score <= 100 for score in between.values())
    by_name = {row["annotator"]: row for row in found["interplay"]}
    behind = by_name["sandbox"]["comparisons"]["C > R"]
    assert len(behind) > 5
    assert f"sandbox, sandbox: C > R: {behind[0]}" in printed
    shares = by_name["sandbox"]["shares"]
    assert shares["C > R"] > shares["C < R"]
    assert shares["C > R"] + shares["C < R"] + shares["C ? R"] == pytest.approx(100)
    page = (tmp_path / "found" / "index.html").read_text()
    assert page.count("<svg") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page


def test_without_out_the_page_lies_in_the_run(judged: Path) -> None:
    assert main(["analyze", "--run-dir", str(judged)]) == 0
    assert (judged / "analysis" / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--people", "carl"], "--people carl: no such annotator; there are sandbox, ann, bob"),
        (["--list", "C = R"], "--list C = R: no such cell; there are both chosen, both rejected, C > R, C < R, C ? R"),
    ],
)
def test_names_that_are_none_say_which_there_are(
    arguments: list[str], message: str, judged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", "--run-dir", str(judged), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_is_not_judged_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "--run-dir", str(tmp_path)]) == 2
    assert "no `items` yet; run `jpo items` first" in capsys.readouterr().err


def test_annotators_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match=r"annotators need distinct names .* got sandbox, sandbox"):
        parse_config(
            {
                "items": {"train": [{"path": "sandbox"}]},
                "model": {"model_name_or_path": "sandbox"},
                "judge": {"annotator": "sandbox", "also": [{"annotator": "sandbox"}]},
            },
            "test",
        )


def test_a_judgment_that_is_given_twice_counts_once(judged: Path, tmp_path: Path) -> None:
    table = str(judged / "judge" / "judgments.parquet")
    for name, more in (("once", []), ("twice", ["--judgments", table])):
        assert main(["analyze", "--run-dir", str(judged), "--out", str(tmp_path / name), *more]) == 0
    once, twice = (json.loads((tmp_path / name / "analysis.json").read_text()) for name in ("once", "twice"))
    assert once == twice


def test_judgments_that_contradict_each_other_are_refused(
    judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = records.read_table(judged / "judge" / "judgments.parquet", records.JUDGMENTS).to_pylist()
    other = {"a": "b", "b": "tie", "tie": "a"}
    for name, change, message in (
        ("other", {"verdict": other[rows[0]["verdict"]]}, "otherwise in another table"),
        ("people", {"annotator": "people"}, "is called `people`"),
    ):
        records.write_table(tmp_path / f"{name}.parquet", [rows[0] | change], records.JUDGMENTS)
        arguments = ["--run-dir", str(judged), "--judgments", str(tmp_path / f"{name}.parquet")]
        assert main(["analyze", *arguments, "--out", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["/a/b.jsonl", "/a/c.jsonl", "sandbox"]) == {
        "/a/b.jsonl": "b.jsonl", "/a/c.jsonl": "c.jsonl", "sandbox": "sandbox"
    }  # fmt: skip
    assert set(short_names(["/x/one/b.jsonl", "/x/two/b.jsonl"]).values()) == {"one/b.jsonl", "two/b.jsonl"}
