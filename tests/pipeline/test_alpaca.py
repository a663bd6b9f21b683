"""`jpo alpaca-eval`: files out of a finished run, and win rates from annotations of them."""

import json
from pathlib import Path

import pytest

from jpo_ray.cli import main


def test_samples_go_out_and_win_rates_come_back(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of six answers of JPO's the judge prefers four, finds one equal and one worse."""
    out = tmp_path / "alpaca"
    assert main(["alpaca-eval", "export", "--run-dir", str(run_dir), "--out", str(out)]) == 0
    assert "alpaca_eval --model_outputs" in capsys.readouterr().out
    outputs = json.loads((out / "jpo-t0.7" / "model_outputs.json").read_text())
    reference = {row["instruction"]: row["output"] for row in json.loads((out / "reference_outputs.json").read_text())}
    preferences = [2, 2, 2, 2, 1.5, 1]
    annotations = [
        {
            "instruction": row["instruction"], "output_1": reference[row["instruction"]], "generator_1": "gold",
            "output_2": row["output"], "generator_2": row["generator"], "preference": preference, "annotator": "judge",
        }
        for row, preference in zip(outputs, preferences, strict=True)
    ]  # fmt: skip
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(annotations))
    arguments = ["alpaca-eval", "import", "--run-dir", str(run_dir), "--out", str(tmp_path / "won"), str(file)]
    assert main(arguments) == 0
    left = "left out, since no annotation is of their generators: 12 of 18 samples (sft-t0.7, dpo-t0.7)"
    assert left in " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "won" / "win_rates.json").read_text())["models"]
    assert list(found) == ["jpo"]
    assert found["jpo"]["win_rate"]["mean"] == pytest.approx(100 * 4.5 / 6)
    assert "50" in found["jpo"]["length_controlled"]["reason"]  # instructions are too few for it
    file.write_text(json.dumps(annotations[:-1]))
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_soft_preferences_give_alpaca_evals_own_win_rate_beside_the_discrete_one(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Preferences 1.49, 1.49, 1.6, 2, 1 and none: mean (0.49 + 0.49 + 0.6 + 1 + 0) / 5, two wins of five verdicts."""
    out = tmp_path / "alpaca"
    assert main(["alpaca-eval", "export", "--run-dir", str(run_dir), "--out", str(out)]) == 0
    reference = {row["instruction"]: row["output"] for row in json.loads((out / "reference_outputs.json").read_text())}
    outputs = json.loads((out / "jpo-t0.7" / "model_outputs.json").read_text())
    rows = [
        {
            "instruction": row["instruction"], "output_1": reference[row["instruction"]], "output_2": row["output"],
            "generator_2": row["generator"], "preference": preference,
        }
        for row, preference in zip(outputs, [1.49, 1.49, 1.6, 2, 1, None], strict=True)
    ]  # fmt: skip
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(rows))
    capsys.readouterr()
    arguments = ["alpaca-eval", "import", str(file), "--run-dir", str(run_dir), "--out", str(tmp_path / "won")]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    entry = json.loads((tmp_path / "won" / "win_rates.json").read_text())["models"]["jpo"]
    assert entry["win_rate"]["0.7"] == pytest.approx(40.0)
    assert entry["soft"]["0.7"]["win_rate"] == pytest.approx(51.6)
    assert entry["soft"]["0.7"]["n"] == 5
    (line,) = [line for line in shown.splitlines() if line.split()[:1] == ["jpo-t0.7"]]
    low, high = entry["soft"]["0.7"]["ci95"]
    assert line.split()[1:5] == ["51.6", f"{low:.1f}", "to", f"{high:.1f}"]
    assert (line.split()[5], line.split()[-1]) == ("40.0", "5")
    assert "win_rate is the mean preference; discrete (its discrete_win_rate) counts each verdict whole" in " ".join(
        shown.split()
    )


def test_annotations_without_a_preference_are_counted_or_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, won = tmp_path / "alpaca", tmp_path / "won"
    assert main(["alpaca-eval", "export", "--run-dir", str(run_dir), "--out", str(out)]) == 0
    reference = {row["instruction"]: row["output"] for row in json.loads((out / "reference_outputs.json").read_text())}
    rows = [
        {
            "instruction": row["instruction"], "output_1": reference[row["instruction"]], "output_2": row["output"],
            "generator_2": row["generator"], "preference": 2 if number < 2 else None,
        }
        for number, row in enumerate(json.loads((out / "sft-t0.7" / "model_outputs.json").read_text()))
    ]  # fmt: skip
    file = tmp_path / "annotations.json"
    arguments = ["alpaca-eval", "import", str(file), "--run-dir", str(run_dir), "--out", str(won)]
    file.write_text(json.dumps(rows))
    capsys.readouterr()
    assert main(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: 4 of 6 verdicts of alpaca_eval are invalid: AlpacaEval has no preference (4)" in shown
    entry = json.loads((won / "win_rates.json").read_text())["models"]["sft"]
    assert (entry["n"], entry["invalid"], entry["empty"]) == (2, 4, 0)
    file.write_text(json.dumps([row | {"preference": None} for row in rows]))
    assert main(arguments) == 2
    assert "judge: 6 of 6 verdicts of alpaca_eval are invalid" in capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_code_2(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--run-dir", str(run_dir), "--out", str(tmp_path / "out")]
    for arguments, message in (
        (["import", *common], "needs the files of annotations"),
        (["export", "x.json", *common], "takes no files"),
        (["import", str(tmp_path / "none.json"), *common], "none.json: no such file"),
        (["export", "--run-dir", str(tmp_path / "none"), "--out", str(tmp_path)], "run `jpo items` first"),
    ):
        assert main(["alpaca-eval", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
