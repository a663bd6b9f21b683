"""`jpo judge --pairs FILE --out DIR`, from the command line to the files it writes."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from feedback.serving import endpoint
from rich.console import Console

from jpo_ray import records
from jpo_ray.cli import main
from jpo_ray.config import Source
from jpo_ray.data.sources import read_source
from jpo_ray.pipeline.judge_files import report_table
from jpo_ray.sandbox import make_rows


def joint(*texts: str) -> dict[str, Any]:
    return dict(zip(("instruction_0", "response_0", "instruction_1", "response_1"), texts, strict=True))


ROWS = [
    joint("Name a bird.", "Wren", "Name two fish.", "Carp, pike"),
    joint("Name a bird.", "Nightingale", "Name a tree.", "Oak"),
    joint("Name a fish.", "Carp", "Name a bird.", "Wren"),
    joint("Name two fish.", "Carp, pike", "Name a bird.", "Wren"),  # the first one again, the other way round
]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_joint_comparisons_are_judged_and_written_in_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, out = written(tmp_path / "pairs.jsonl", ROWS), tmp_path / "out"
    with endpoint() as server:
        arguments = ["judge", "--pairs", str(pairs), "--out", str(out), f"judge.base_url={server.url}"]
        assert main([*arguments, "--dry-run"]) == 0
        assert server.counts() == {}
        assert "3 comparisons in both orders: 6 requests" in capsys.readouterr().out
        assert not out.exists()
        assert main(arguments) == 0
        assert main(arguments) == 0
        assert server.counts()["requests"] == 6  # three distinct comparisons in both orders, once
        assert main([*arguments, "--dry-run"]) == 0
    assert "0 requests" in capsys.readouterr().out.replace("\n", " ")
    assert [row["feedback"] for row in read(out / "feedback.jsonl")] == [1, 0, 2, 0]
    assert [{k: v for k, v in row.items() if k != "feedback"} for row in read(out / "feedback.jsonl")] == ROWS
    assert read(out / "preferences.jsonl")[0] == {
        "i_chosen": "Name two fish.", "r_chosen": "Carp, pike", "i_reject": "Name a bird.", "r_reject": "Wren"
    }  # fmt: skip
    assert read(out / "preferences.jsonl")[2] == read(out / "preferences.jsonl")[0]
    report = json.loads((out / "report.json").read_text())
    assert (report["joint"]["judgments"], report["joint"]["tie"], report["conditional"]["judgments"]) == (3, 1, 0)
    assert report["all"]["flip_rate"] == pytest.approx(1 / 3)
    table = records.read_table(out / "judgments.parquet", records.JUDGMENTS)
    assert set(table["annotator"].to_pylist()) == {"gpt-3.5-turbo-0125"}
    # What is written can be read again, with the verdicts as labels.
    again = read_source(Source(path=str(out / "feedback.jsonl")), "fail").rows
    assert [row.verdict for row in again] == ["b", "a", "tie", "a"]
    trl = read_source(Source(path=str(out / "trl_preferences.jsonl")), "fail").rows
    assert trl[0].items == (("Name two fish.", "Carp, pike"), ("Name a bird.", "Wren"))
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"canary" not in path.read_bytes()


def test_conditional_comparisons_have_one_prompt(tmp_path: Path) -> None:
    rows = [{"instruction": "Name a bird.", "response_0": "Wren", "response_1": "Nightingale"}]
    out = tmp_path / "out"
    with endpoint() as server:
        pairs = written(tmp_path / "pairs.jsonl", rows)
        assert main(["judge", "--pairs", str(pairs), "--out", str(out), f"judge.base_url={server.url}"]) == 0
    assert read(out / "feedback.jsonl") == [rows[0] | {"feedback": 1}]
    (row,) = read(out / "trl_preferences.jsonl")
    assert row["prompt"] == [{"role": "user", "content": "Name a bird."}]
    assert row["chosen"] == [{"role": "assistant", "content": "Nightingale"}]


def test_the_sandbox_judges_files_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It knows its own instructions only: of four comparisons one has a verdict, and of three none."""
    of_sandbox = [
        {name: row[name] for name in ("instruction", "response_0", "response_1")} for row in make_rows("test", 1, 0)
    ]
    others = [{"instruction": f"Name bird {n}.", "response_0": "Wren", "response_1": "Owl"} for n in range(3)]
    pairs = written(tmp_path / "pairs.jsonl", [*of_sandbox, *others, others[0]])
    command = ["judge", "--pairs", str(pairs), "--out", str(tmp_path / "out"), "judge.annotator=sandbox"]
    assert main(command) == 0
    assert len(records.read_table(tmp_path / "out" / "judgments.parquet", records.JUDGMENTS)) == 4
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 of 5 comparisons repeat another one, and are judged with it" in shown
    assert "warning: 3 of 4 verdicts of sandbox are invalid: not an instruction of the sandbox" in shown
    shutil.rmtree(tmp_path / "out")
    written(pairs, others)
    assert main(command) == 2
    assert "judge: 3 of 3 verdicts of sandbox are invalid: not an instruction" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_judge_that_answers_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, out = written(tmp_path / "pairs.jsonl", ROWS), tmp_path / "out"
    with endpoint(faults={"empty": 1.0}) as server:
        assert main(["judge", "--pairs", str(pairs), "--out", str(out), f"judge.base_url={server.url}"]) == 2
    said = capsys.readouterr().err
    assert (
        "judge: 3 of 3 verdicts of gpt-3.5-turbo-0125 are invalid: the answer is neither of the two, twice (3)" in said
    )
    assert said.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "{file}"], "takes --config and --run-dir, or --pairs and --out"),
        (["--out", "x"], "takes --config and --run-dir, or --pairs and --out"),
        (["--pairs", "{file}", "--out", "x", "--run-dir", "y"], "takes --config and --run-dir, or --pairs and --out"),
        (["--config", "x"], "takes --config and --run-dir, or --pairs and --out"),
        (["--pairs", "none.jsonl", "--out", "x"], "none.jsonl: no such file"),
        (
            ["--pairs", "{file}", "--out", "x", "train.jpo.beta=1"],
            "only judge.key=value and cluster.key=value",
        ),
        (["--pairs", "{file}", "--out", "x", "judge.modell=a"], "modell"),
        (["--pairs", "{file}", "--out", "x", "judge.max_cost=1"], "max_cost needs prompt_price"),
        (["--pairs", "{file}", "--out", "x", "judge.annotator=labels"], "labels: the data have none"),
        (["--pairs", "{lone}", "--out", "x"], "line 1: holds one item"),
        (
            ["--pairs", "{empty}", "--out", "x"],
            "line 2: empty `response_0` (2 more rows cannot be used); mend it, or leave it out\n",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "pairs.jsonl", ROWS)
    lone = written(tmp_path / "lone.jsonl", [{"instruction": "Name a bird.", "response": "Wren"}])
    without = [*ROWS[:1], *(row | {"response_0": ""} for row in ROWS[1:])]
    empty = written(tmp_path / "empty.jsonl", without)
    assert main(["judge", *(text.format(file=file, lone=lone, empty=empty) for text in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("a file")
    rows = [
        {name: row[name] for name in ("instruction", "response_0", "response_1")} for row in make_rows("test", 2, 0)
    ]
    pairs, out = written(tmp_path / "pairs.jsonl", rows), tmp_path / "taken" / "out"
    assert main(["judge", "--pairs", str(pairs), "--out", str(out), "judge.annotator=sandbox"]) == 2
    assert f"--out {out}: cannot be written (Not a directory)" in capsys.readouterr().err


def test_ratings_and_labels_of_a_file_judge_it(tmp_path: Path) -> None:
    row = {"instruction": "Name a bird.", "completions": []}
    row["completions"] = [
        {"response": name, "overall_score": score} for name, score in (("Wren", 5), ("Oak", 1), ("Owl", 5))
    ]
    pairs = written(tmp_path / "rated.jsonl", [row])
    assert main(["judge", "--pairs", str(pairs), "--out", str(tmp_path / "r"), "judge.annotator=ratings"]) == 0
    assert [row["feedback"] for row in read(tmp_path / "r" / "feedback.jsonl")] == [0, 2, 1]
    labels = ["judge", "--pairs", str(tmp_path / "r" / "feedback.jsonl"), "--out", str(tmp_path / "l")]
    assert main([*labels, "judge.annotator=labels"]) == 0
    assert read(tmp_path / "l" / "feedback.jsonl") == read(tmp_path / "r" / "feedback.jsonl")


def test_the_table_fits_eighty_columns() -> None:
    counts = {
        "judgments": 12345, "a": 3456, "b": 3456, "tie": 3456, "invalid": 3456, "flip_rate": 0.25,
        "flip_rate_ci95": [0.2, 0.3], "tokens": 1234567, "cost": 12.5,
    }  # fmt: skip
    shown = io.StringIO()
    Console(file=shown, width=80).print(report_table({"conditional": counts}))
    cells = ["conditional", "12,345", "3,456", "3,456", "3,456", "3,456", "25.0%", "1,234,567", "$12.50"]
    assert shown.getvalue().splitlines()[-2].split() == cells
