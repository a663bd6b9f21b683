"""Sampling: several samples of each instruction, texts that end one, and going on where it was stopped."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jpo_ray import records
from jpo_ray.cluster import sampling
from jpo_ray.evaluation.generation import Generated
from jpo_ray.files import read_json
from jpo_ray.pipeline import run_stages
from pipeline.inline import Cluster, run, small_config

SAMPLE = {"engine": "transformers", "temperatures": [0.7], "max_new_tokens": 16}


def sampled(run_dir: Path) -> list[dict[str, Any]]:
    return records.read_table(run_dir / "sample" / "samples.parquet", records.SAMPLES).to_pylist()


def test_several_samples_of_each_instruction(run_dir: Path, cluster: Cluster) -> None:
    once = sampled(run_dir)
    run(small_config(sample=SAMPLE | {"samples_per_instruction": 3}, evaluate={"tournament": {}}), run_dir)
    rows = sampled(run_dir)
    counts = Counter((row["model"], row["instruction_id"]) for row in rows)
    assert set(counts.values()) == {3}
    assert len({(row["instruction_id"], row["seed"]) for row in rows}) == 18  # the same seeds for every model
    assert {(row["instruction_id"], row["seed"]) for row in once} <= {
        (row["instruction_id"], row["seed"]) for row in rows
    }
    assert any("sample 54" in call for call in cluster.calls)


def test_a_text_that_ends_a_response_is_left_out(run_dir: Path, cluster: Cluster) -> None:
    whole = {(row["model"], row["instruction_id"]): row["response"] for row in sampled(run_dir)}
    letter = Counter(letter for response in whole.values() for letter in response[2:]).most_common(1)[0][0]
    run(small_config(sample=SAMPLE | {"stop": [letter]}), run_dir, ["sample"])
    ended = {(row["model"], row["instruction_id"]): row["response"] for row in sampled(run_dir)}
    assert all(letter not in response for response in ended.values())
    assert any(len(ended[key]) < len(whole[key]) for key in whole)
    assert cluster.calls[-1].startswith("sample")


def test_an_interrupted_build_asks_only_for_what_is_missing(
    run_dir: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sampling.generate

    def interrupted(*arguments: Any) -> Any:
        for number, answer in enumerate(real(*arguments)):
            if number == 7:
                raise KeyboardInterrupt
            yield answer

    config = small_config(sample=SAMPLE | {"seed": 5})
    monkeypatch.setattr(sampling, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, run_dir, ["sample"])
    (left,) = (run_dir / ".building").glob("sample-*/answered.jsonl")
    with left.open("a") as file:
        file.write('{"number": 17, "respon')  # cut short by a kill
    monkeypatch.setattr(sampling, "generate", real)
    run(config, run_dir, ["sample"])
    assert cluster.calls[-1] == "sample 11 with transformers"  # of 18
    assert len(sampled(run_dir)) == 18
    assert not (run_dir / "sample" / "answered.jsonl").exists()


def test_requests_that_fail_are_named_and_asked_again(
    run_dir: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sampling.generate

    def failing(*arguments: Any) -> Any:
        for answer in real(*arguments):
            yield Generated(answer.number, "", 0, "ValueError: no\nroom") if answer.number in (3, 11) else answer

    config, shown = small_config(sample=SAMPLE | {"seed": 6}), io.StringIO()
    monkeypatch.setattr(sampling, "generate", failing)
    with pytest.raises(RuntimeError, match=r"2 of 18 requests failed .* the other responses are kept"):
        run_stages(config, run_dir, ["sample"], Console(file=shown, width=200))
    assert shown.getvalue().count("ValueError: no room") == 2
    assert "no response of sft at temperature 0.7 to '" in shown.getvalue()
    monkeypatch.setattr(sampling, "generate", real)
    run(config, run_dir, ["sample"])
    assert cluster.calls[-1] == "sample 2 with transformers"
    assert len(sampled(run_dir)) == 18


def test_instructions_beyond_the_limit_are_counted(run_dir: Path, cluster: Cluster) -> None:
    there = len({row["instruction_id"] for row in sampled(run_dir)})
    run(small_config(sample=SAMPLE | {"max_instructions": 2}), run_dir, ["sample"])
    assert len({row["instruction_id"] for row in sampled(run_dir)}) == 2
    counts = read_json(run_dir / "sample" / "manifest.json")["counts"]
    assert (counts["instructions"], counts["left out beyond max_instructions"]) == (2, there - 2)
    assert cluster.calls[-1].startswith("sample")
