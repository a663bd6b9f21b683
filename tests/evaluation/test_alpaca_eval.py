"""AlpacaEval's files, by hand: what is written, what is read, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jpo_ray import records
from jpo_ray.config_base import NAME_PATTERN
from jpo_ray.errors import InputError
from jpo_ray.evaluation.alpaca_eval import generator_name, read_annotations, write_outputs
from jpo_ray.evaluation.win_rates import win_rates

QUESTIONS = ["Name a fruit.", "Größe des Mondes?\u2028In km.", 'Say "no".']
GOLDS = {records.instruction_id(question): f"gold of {question}" for question in QUESTIONS}


def sample(model: str, temperature: float, question: int, response: str, seed: int = 0) -> dict[str, Any]:
    instruction = QUESTIONS[question]
    return {
        "instruction_id": records.instruction_id(instruction),
        "instruction": instruction,
        "model": model,
        "temperature": temperature,
        "effective_temperature": temperature,
        "seed": seed,
        "response": response,
        "finish_reason": "stop",
        "engine": "transformers",
    }


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, records.SAMPLES)


def two_models() -> pa.Table:
    return table(
        [
            sample(model, temperature, question, f"{model} at {temperature} of {question}")
            for model in ("sft", "jpo")
            for temperature in (0.001, 1.0)
            for question in range(3)
        ]
    )


def annotations(outputs: Path, preferences: list[float | None]) -> list[dict[str, Any]]:
    """What AlpacaEval writes when it has judged a file of outputs: keys and their order as it publishes them."""
    reference = {
        row["instruction"]: row for row in json.loads((outputs.parent.parent / "reference_outputs.json").read_text())
    }
    return [
        {
            "instruction": row["instruction"],
            "output_1": reference[row["instruction"]]["output"],
            "generator_1": reference[row["instruction"]]["generator"],
            "dataset": "helpful_base",
            "output_2": row["output"],
            "generator_2": row["generator"],
            "annotator": "weighted_alpaca_eval_gpt4_turbo",
            "preference": preference,
            "price_per_example": 0.01,
            "time_per_example": 2.5,
            "raw_completion": None,
        }
        for row, preference in zip(json.loads(outputs.read_text()), preferences, strict=True)
    ]


def written(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


def exported(tmp_path: Path, preferences: list[float | None]) -> tuple[pa.Table, Path, list[dict[str, Any]]]:
    """One model's samples, where its annotations go, and the annotations."""
    samples = table([sample("jpo", 0.5, question, f"answer {question}") for question in range(len(preferences))])
    (outputs,) = write_outputs(samples, GOLDS, tmp_path)
    return samples, tmp_path / "annotations.json", annotations(outputs, preferences)


def test_outputs_are_a_file_per_model_and_temperature(tmp_path: Path) -> None:
    paths = write_outputs(two_models(), GOLDS, tmp_path / "new")
    names = ["sft-t0.001", "sft-t1.0", "jpo-t0.001", "jpo-t1.0"]
    assert paths == [tmp_path / "new" / name / "model_outputs.json" for name in names]
    assert json.loads(paths[2].read_text()) == [
        {"instruction": question, "output": f"jpo at 0.001 of {number}", "generator": "jpo-t0.001"}
        for number, question in enumerate(QUESTIONS)
    ]
    assert json.loads((tmp_path / "new/reference_outputs.json").read_text()) == [
        {"instruction": question, "output": f"gold of {question}", "generator": "gold"} for question in QUESTIONS
    ]


def test_a_sample_without_gold_response_is_refused(tmp_path: Path) -> None:
    golds = dict(list(GOLDS.items())[:2])
    with pytest.raises(InputError, match=r"^no gold response for the instruction 'Say \"no\"\.' \(1 of 3 lack one\)"):
        write_outputs(two_models(), golds, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["jpo", "org/model:v1", "../up", "…", "", "a" * 300, ".hidden", "new\nline"])
def test_generator_names_are_file_names(model: str) -> None:
    name = generator_name(model, 0.001)
    assert name.endswith("-t0.001")
    assert len(name) < 100
    assert re.fullmatch(NAME_PATTERN, name)


def test_generator_names_differ_where_models_or_temperatures_do() -> None:
    models = ["a/b", "a_b", "a:b", "…", "?", "a" * 300, "a" * 301]
    assert len({generator_name(model, temperature) for model in models for temperature in (0.001, 0.5, 1.0)}) == 21
    assert generator_name("jpo", 1) == generator_name("jpo", 1.0) == "jpo-t1.0"


def test_preferences_are_read_in_alpaca_evals_direction(tmp_path: Path) -> None:
    """1 is the reference (b), 2 the model (a), 1.5 a tie, null nothing; between lies a soft verdict."""
    samples, path, rows = exported(tmp_path, [2.0, 1, None])
    judged = read_annotations([written(path, rows)], samples, GOLDS)
    assert [row["verdict"] for row in judged] == ["a", "b", "invalid"]
    assert [row["probability"] for row in judged] == [None, None, None]
    assert judged[2]["reason"]
    assert judged[0] == {
        "instruction_id": records.instruction_id(QUESTIONS[0]),
        "model": "jpo",
        "temperature": 0.5,
        "seed": 0,
        "annotator": "weighted_alpaca_eval_gpt4_turbo",
        "verdict": "a",
        "verdict_ab": "a",
        "verdict_ba": None,
        "probability": None,
        "gap": None,
        "text_ab": "",
        "text_ba": None,
        "tokens": 0,
        "cost": 0.01,
        "reason": "",
    }


@pytest.mark.parametrize(
    ("preference", "verdict", "probability"),
    [
        (1.5, "tie", 0.5),
        (1.9987, "a", 0.9987),
        (1.2, "b", 0.2),
        (0, "tie", None),  # how older versions wrote equal outputs
        (-1, "invalid", None),  # how their caches write a missing answer
        (float("nan"), "invalid", None),
    ],
)
def test_other_preferences(tmp_path: Path, preference: float, verdict: str, probability: float | None) -> None:
    samples, path, rows = exported(tmp_path, [preference])
    (judged,) = read_annotations([written(path, rows)], samples, GOLDS)
    assert judged["verdict"] == verdict
    assert judged["probability"] == pytest.approx(probability)


def test_round_trip_gives_the_win_rates_of_the_preferences(tmp_path: Path) -> None:
    """For jpo at 0.001 two wins and a tie of 3: 250 / 3 percent; at 1.0, with one invalid, a win of 2."""
    samples = two_models()
    paths = write_outputs(samples, GOLDS, tmp_path)
    preferences: list[list[float | None]] = [[1, 1, 2], [1, 1.5, 2], [2, 2, 1.5], [2, None, 1]]
    files = [
        written(path.with_name("annotations.json"), annotations(path, given))
        for path, given in zip(paths, preferences, strict=True)
    ]
    judged = read_annotations(files, samples, GOLDS)
    judgments = pa.Table.from_pylist(judged, records.SAMPLE_JUDGMENTS)
    for name in ("instruction_id", "model", "temperature", "seed"):
        assert judgments[name].equals(samples[name])
    models = win_rates(judgments, 10, 0)["models"]
    assert models["sft"]["win_rate"] == pytest.approx({"0.001": 100 / 3, "1.0": 50.0, "mean": 125 / 3})
    assert models["jpo"]["win_rate"] == pytest.approx({"0.001": 250 / 3, "1.0": 50.0, "mean": 200 / 3})
    assert models["jpo"]["invalid"] == 1
    together = written(tmp_path / "all.json", [row for file in files for row in reversed(json.loads(file.read_text()))])
    assert read_annotations([together], samples, GOLDS) == judged


def test_generators_that_no_file_names_are_left_out(tmp_path: Path) -> None:
    samples = two_models()
    paths = write_outputs(samples, GOLDS, tmp_path)
    file = written(tmp_path / "annotations.json", annotations(paths[3], [2, 2, 1]))
    judged = read_annotations([file], samples, GOLDS)
    assert [(row["model"], row["temperature"]) for row in judged] == [("jpo", 1.0)] * 3
    assert read_annotations([], samples, GOLDS) == []


def test_equal_samples_share_an_annotation_and_its_price(tmp_path: Path) -> None:
    """AlpacaEval drops repeated pairs; equal texts of two generators it annotates each."""
    same = [sample("jpo", 0.5, 0, "same", seed) for seed in (1, 2)]
    samples = table([*same, sample("sft", 0.5, 0, "same")])
    of_jpo, of_sft = write_outputs(samples, GOLDS, tmp_path)
    rows = annotations(of_jpo, [2, 2])[:1] + annotations(of_sft, [1])
    judged = read_annotations([written(tmp_path / "annotations.json", rows)], samples, GOLDS)
    assert [(row["seed"], row["verdict"], row["cost"]) for row in judged] == [
        (1, "a", 0.01),
        (2, "a", 0.0),
        (0, "b", 0.01),
    ]


def test_what_is_optional_may_lack(tmp_path: Path) -> None:
    samples, path, rows = exported(tmp_path, [2])
    kept = ("instruction", "output_1", "output_2", "generator_2", "preference")
    (judged,) = read_annotations([written(path, [{name: rows[0][name] for name in kept}])], samples, GOLDS)
    assert (judged["annotator"], judged["cost"], judged["text_ab"]) == ("alpaca_eval", 0.0, "")


def test_the_judges_answer_is_kept_as_text(tmp_path: Path) -> None:
    samples, path, rows = exported(tmp_path, [2, 1])
    rows[0]["raw_completion"], rows[1]["raw_completion"] = "Output (b)", {"explanation": "better", "rank": 1}
    judged = read_annotations([written(path, rows)], samples, GOLDS)
    assert [row["text_ab"] for row in judged] == ["Output (b)", '{"explanation": "better", "rank": 1}']


@pytest.mark.parametrize(
    ("column", "value", "trouble"),
    [
        ("output_2", "another answer", "jpo-t0.5 has no sample of this `instruction` and `output_2`"),
        ("instruction", "Another question?", "jpo-t0.5 has no sample of this `instruction` and `output_2`"),
        ("generator_2", "jpo", "no sample is of `generator_2` 'jpo'"),
        ("output_1", "another reference", "`output_1` is not the gold response"),
    ],
)
def test_annotations_of_no_sample_are_counted_and_the_first_named(
    tmp_path: Path, column: str, value: str, trouble: str
) -> None:
    samples, path, rows = exported(tmp_path, [2, 1, 2])
    for row in rows[1:]:
        row[column] = value
    with pytest.raises(InputError) as caught:
        read_annotations([written(path, rows)], samples, GOLDS)
    message = str(caught.value)
    assert message.startswith(f"{path} row 2: {trouble}: ")
    assert message.endswith("(of 3 annotations 2 match no sample, 0 are repeated)")
    assert "\n" not in message


def test_repeated_annotations_are_counted_and_the_first_named(tmp_path: Path) -> None:
    samples, path, rows = exported(tmp_path, [2, 1])
    with pytest.raises(InputError) as caught:
        read_annotations([written(path, [*rows, rows[0], rows[0]])], samples, GOLDS)
    assert str(caught.value) == (
        f"{path} row 3: a second annotation of jpo-t0.5's sample of this instruction: 'Name a fruit.' "
        "(of 4 annotations 0 match no sample, 2 are repeated)"
    )
    with pytest.raises(InputError, match="row 1: a second annotation"):
        read_annotations([written(path, rows), path], samples, GOLDS)


def test_samples_without_annotation_are_counted_and_the_first_named(tmp_path: Path) -> None:
    samples, path, rows = exported(tmp_path, [2, 1, 2])
    with pytest.raises(InputError) as caught:
        read_annotations([written(path, rows[:1])], samples, GOLDS)
    message = str(caught.value)
    assert message.startswith(f"{path}: 2 of 3 samples have no annotation, the first is jpo-t0.5's")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": 2.5}, "row 1: `preference` is 2.5; it goes from 1"),
        ({"preference": 0.5}, "row 1: `preference` is 0.5; it goes from 1"),
        ({"preference": "2"}, "row 1: `preference` is no number"),
        ({"preference": True}, "row 1: `preference` is no number"),
        ({"price_per_example": "free"}, "row 1: `price_per_example` is no number"),
        ({"output_2": None}, "row 1: `output_2` is no text"),
    ],
)
def test_values_of_another_kind_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    samples, path, rows = exported(tmp_path, [2])
    with pytest.raises(InputError, match=message):
        read_annotations([written(path, [rows[0] | changes])], samples, GOLDS)


@pytest.mark.parametrize("name", ["instruction", "output_1", "output_2", "generator_2", "preference"])
def test_columns_that_lack_are_named(tmp_path: Path, name: str) -> None:
    samples, path, rows = exported(tmp_path, [2])
    del rows[0][name]
    with pytest.raises(InputError, match=f"row 1: `{name}` is missing"):
        read_annotations([written(path, rows)], samples, GOLDS)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_annotations([tmp_path / "annotations.json"], two_models(), GOLDS)
    with pytest.raises(InputError, match="has no rows"):
        read_annotations([written(tmp_path / "annotations.json", [])], two_models(), GOLDS)
