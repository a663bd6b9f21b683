"""`jpo evaluate --samples FILE --gold FILE --out DIR`, from the command line to the win rate."""

import json
from pathlib import Path
from typing import Any

import pytest
from feedback.serving import endpoint

from jpo_ray import records
from jpo_ray.cli import main
from pipeline.test_judge_files import written

GOLD = [{"instruction": f"Name bird {n}.", "gold_response": "A wren."} for n in range(6)]
LONGER, SHORTER, SAME = "A nightingale, I think.", "Wren.", "A wren."
OUTPUTS = [LONGER, LONGER, LONGER, SHORTER, SAME, SAME]  # three wins, a loss, two ties


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))


def evaluated(tmp_path: Path, rows: list[dict[str, Any]], *flags: str) -> dict[str, Any]:
    samples, gold, out = (
        written(tmp_path / "samples.jsonl", rows),
        written(tmp_path / "gold.jsonl", GOLD),
        tmp_path / "out",
    )
    with endpoint() as server:
        command = ["evaluate", "--samples", str(samples), "--gold", str(gold), "--out", str(out), *flags]
        assert main([*command, f"judge.base_url={server.url}"]) == 0
    found: dict[str, Any] = json.loads((out / "win_rate.json").read_text())
    return found


def test_released_samples_carry_the_template(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"### Instructions: Name bird {n}.\n\n### Response:", "outputs": output}
        for n, output in enumerate(OUTPUTS)
    ]
    found = evaluated(tmp_path, rows)
    assert {name: found[name] for name in ("win_rate", "wins", "ties", "losses", "invalid", "n")} == {
        "win_rate": pytest.approx(100 * 4 / 6), "wins": 3, "ties": 2, "losses": 1, "invalid": 0, "n": 6
    }  # fmt: skip
    assert found["flip_rate"] == 0  # the two ties are the gold response itself, which is not asked about
    low, high = found["ci95"]
    assert 0 < low < 100 * 4 / 6 < high <= 100
    table = records.read_table(tmp_path / "out" / "judgments.parquet", records.SAMPLE_JUDGMENTS)
    assert len(table) == 6


def test_posts_to_summarise_are_found_in_their_template(tmp_path: Path) -> None:
    start = "### Instructions: You are given a social media post, summarize it accordingly. \nPost: "
    rows = [{"instruction": f"{start}Name bird {n}.\n\n### Response:", "outputs": [LONGER]} for n in range(6)]
    assert evaluated(tmp_path, rows)["win_rate"] == 100


def test_generators_are_kept_apart(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Name bird {n}.", "output": text, "generator": name}
        for n in range(6)
        for name, text in (("long", LONGER), ("short", SHORTER))
    ]
    found = evaluated(tmp_path, rows)
    assert {name: entry["win_rate"] for name, entry in found.items()} == {"long": 100, "short": 0}


def test_rows_may_belong_together_by_order(tmp_path: Path) -> None:
    rows = [{"instruction": f"Another wording {n}", "outputs": output} for n, output in enumerate(OUTPUTS)]
    assert evaluated(tmp_path, rows, "--by-order")["wins"] == 3


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        (
            {"instruction": "Name a tree.", "outputs": "x"},
            [],
            "line 1: {gold} has no gold response for the instruction 'Name a tree.' (1 of 1 samples match none)",
        ),
        ({"instruction": "Name bird 1."}, [], "line 1: `output` is missing"),
        ({"outputs": "x"}, [], "line 1: `instruction` is missing"),
        ({"instruction": "Name bird 1.", "outputs": ["x", "y"]}, [], "line 1: `outputs` is no text"),
        (
            {"instruction": "Name bird 1.", "outputs": "x"},
            ["judge.annotator=labels"],
            "labels judge only what they came",
        ),
    ],
)
def test_what_does_not_match_is_one_line(
    row: dict[str, Any], flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, gold = written(tmp_path / "samples.jsonl", [row]), written(tmp_path / "gold.jsonl", GOLD)
    command = ["evaluate", "--samples", str(samples), "--gold", str(gold), "--out", str(tmp_path / "out"), *flags]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert message.format(gold=gold) in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_two_gold_responses_of_one_instruction_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gold = written(tmp_path / "gold.jsonl", [*GOLD, GOLD[0] | {"gold_response": "A crow."}])
    samples = written(tmp_path / "samples.jsonl", [{"instruction": "Name bird 1.", "outputs": "x"}])
    assert main(["evaluate", "--samples", str(samples), "--gold", str(gold), "--out", str(tmp_path / "out")]) == 2
    assert "line 7: another gold response" in capsys.readouterr().err


def test_flags_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--samples", "x"], ["--samples", "x", "--gold", "y"], [], ["--config", "x", "--out", "y"]):
        assert main(["evaluate", *arguments]) == 2
        assert "takes --config and --run-dir, or --samples and --gold and --out" in capsys.readouterr().err


SANDBOX = "judge.annotator=sandbox"


def command(tmp_path: Path, rows: list[dict[str, Any]], gold: list[dict[str, Any]], *more: str) -> list[str]:
    samples, golds = written(tmp_path / "samples.jsonl", rows), written(tmp_path / "gold.jsonl", gold)
    return ["evaluate", "--samples", str(samples), "--gold", str(golds), "--out", str(tmp_path / "out"), *more]


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    return said


def sandbox_rows(count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Samples that are each instruction's gold response in other words, and the gold responses."""
    from jpo_ray.sandbox import make_rows

    rows = make_rows("test", count, 0)
    samples = [{"instruction": row["instruction"], "output": row["response_1"]} for row in rows]
    return samples, [{name: row[name] for name in ("instruction", "gold_response")} for row in rows]


def test_samples_that_match_no_gold_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": f"Name bird {n}.", "output": "A crow."} for n in (1, 7, 2, 8, 9)]
    said = refused(tmp_path, capsys, command(tmp_path, rows, GOLD))
    assert "samples.jsonl line 2: " in said
    assert "no gold response for the instruction 'Name bird 7.' (3 of 5 samples match none)" in said


def test_the_same_sample_twice_is_refused_unless_it_was_sampled_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"Name bird {n}.", "output": text} for n, text in enumerate(OUTPUTS)]
    said = refused(tmp_path, capsys, command(tmp_path, [*rows, *rows[:2]], GOLD))
    assert "samples.jsonl line 7: the same sample as " in said
    assert "samples.jsonl line 1 (2 of 8 samples repeat another)" in said
    apart = [row | {"seed": 0} for row in rows] + [row | {"seed": 1} for row in rows]
    found = evaluated(tmp_path, apart)
    assert (found["n"], found["wins"], found["win_rate"]) == (12, 6, pytest.approx(100 * 4 / 6))
    assert "samples: 12 samples of 6 instructions, all of which count" in capsys.readouterr().out


def test_instructions_without_a_sample_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": "Name bird 1.", "output": LONGER, "generator": name} for name in ("x", "y")]
    rows.append({"instruction": "Name bird 2.", "output": SHORTER, "generator": "y"})
    found = evaluated(tmp_path, rows)
    assert {name: (entry["n"], entry["without_sample"]) for name, entry in found.items()} == {"x": (1, 5), "y": (2, 4)}
    shown = capsys.readouterr().out
    assert f"x: no sample of 5 of the 6 instructions in {tmp_path / 'gold.jsonl'}" in shown
    assert "y: no sample of 4 of the 6 instructions" in shown


def test_empty_outputs_are_judged_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The judge prefers the longer: an empty output loses, and is one of n."""
    rows = [{"instruction": f"Name bird {n}.", "output": text} for n, text in enumerate([LONGER] * 4 + ["", " \n"])]
    found = evaluated(tmp_path, rows)
    assert {name: found[name] for name in ("n", "wins", "losses", "invalid", "empty")} == {
        "n": 6, "wins": 4, "losses": 2, "invalid": 0, "empty": 2,
    }  # fmt: skip
    assert "empty responses, judged as they are: samples 2" in " ".join(capsys.readouterr().out.split())


def test_files_of_other_lengths_do_not_belong_together_by_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": "x", "output": "y"}] * 4
    said = refused(tmp_path, capsys, command(tmp_path, rows, GOLD, "--by-order"))
    assert f"samples.jsonl has 4 rows and {tmp_path / 'gold.jsonl'} has 6" in said


def test_empty_gold_responses_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gold = [row | ({"gold_response": " "} if n in (2, 4) else {}) for n, row in enumerate(GOLD)]
    said = refused(tmp_path, capsys, command(tmp_path, [{"instruction": "Name bird 1.", "output": "x"}], gold))
    assert "gold.jsonl line 3: `gold_response` is empty (2 of 6 are)" in said


def test_a_judge_that_answers_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of the samples are the gold response, which is a tie that nobody is asked about: they do not save it."""
    rows = [{"instruction": f"Name bird {n}.", "output": text} for n, text in enumerate(OUTPUTS)]
    with endpoint(faults={"empty": 1.0}) as server:
        said = refused(tmp_path, capsys, command(tmp_path, rows, GOLD, f"judge.base_url={server.url}"))
        assert server.counts()["requests"] == 16  # four comparisons in both orders, asked twice
    assert "judge: 4 of 4 verdicts of gpt-3.5-turbo-0125 are invalid" in said
    assert "the answer is neither of the two, twice (4); the first answer: '\\n[asked again]\\n'; mend that" in said


def test_a_judge_that_answers_little_is_a_loud_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sandbox's oracle knows two of the five instructions."""
    samples, gold = sandbox_rows(2)
    rows = [*samples, *({"instruction": f"Name bird {n}.", "output": LONGER} for n in range(3))]
    assert main(command(tmp_path, rows, [*gold, *GOLD[:3]], SANDBOX)) == 0
    found = json.loads((tmp_path / "out" / "win_rate.json").read_text())
    assert (found["n"], found["invalid"]) == (2, 3)
    assert found["invalid_because"].startswith("not an instruction of the sandbox: 'Name bird 0.'")
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: 3 of 5 verdicts of sandbox are invalid: not an instruction of the sandbox" in shown
    assert "most verdicts are invalid, and not in n: samples 3 of 5" in shown
    rows = rows[2:]
    (tmp_path / "again").mkdir()
    said = refused(tmp_path / "again", capsys, command(tmp_path / "again", rows, GOLD, SANDBOX))
    assert "judge: 3 of 3 verdicts of sandbox are invalid: not an instruction of the sandbox" in said
