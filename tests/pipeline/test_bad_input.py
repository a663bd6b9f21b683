"""Bad input that only a stage can find: one line, exit code 2, and nothing half-made."""

import json
import re
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from feedback.serving import endpoint
from safetensors.torch import load_file, save_file

from jpo_ray import records
from jpo_ray.cli import main
from jpo_ray.files import read_json, write_json
from jpo_ray.runs import RunDir
from jpo_ray.sandbox import BASE_MODEL, make_rows
from pipeline.inline import Cluster, run, small_config


@pytest.fixture
def jpo(run_dir: Path, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `jpo` with overrides on a finished run; returns the line it ends with, and what the cluster was asked."""
    assert cluster.calls == []
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(small_config().model_dump(mode="json")))

    def run(stage: str, *overrides: str) -> tuple[str, list[str]]:
        assert main([stage, "--config", str(path), "--run-dir", str(run_dir), *overrides]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert [path for path in (run_dir / ".building").rglob("*") if path.is_file()] == []
        return error, cluster.calls

    return run


def test_a_similarity_band_that_is_too_narrow(jpo: Any) -> None:
    error, _ = jpo("run", "pairs.joint.min_similarity=0.97")
    assert "pairs.joint: the similarity band [0.97, 1] leaves " in error
    assert "pairs, the budget asks for 48; widen min_similarity/max_similarity or lower pairs.joint.budget" in error


def test_a_validation_split_too_small_for_the_band_names_its_own_budget(jpo: Any) -> None:
    error, _ = jpo("run", "pairs.joint.validation_budget=1000")
    assert "12 items make 66 pairs, the budget asks for 1000" in error
    assert "lower pairs.joint.validation_budget" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=2000"], "48 items make 1128 pairs, the budget asks for 2000"),
        (["max_per_item=1", "budget=30"], "max_per_item: 48 items in at most 1 pairs each make at most 24 pairs, the"),
        (
            ["min_per_item=3", "budget=50"],
            "min_per_item: 48 items in at least 3 pairs each take at least 72 pairs, the",
        ),
        (["min_per_item=5", "max_per_item=4"], "min_per_item 5 is above max_per_item 4"),
        (["connected=true", "budget=40"], "connected: it takes 47 pairs to connect 48 items, the budget gives 40"),
        (["connected=true", "group_size=12"], "connected: items of different groups are never compared"),
        (["connected=true", "min_similarity=0.6", "max_similarity=0.62", "budget=47"], "pairs.joint"),
    ],
    ids=["budget", "max", "min", "min above max", "connected", "groups", "disconnected"],
)
def test_limits_that_contradict_each_other(jpo: Any, overrides: list[str], message: str) -> None:
    error, _ = jpo("run", *(f"pairs.joint.{override}" for override in overrides))
    assert message in error


def test_a_max_length_shorter_than_an_instruction(jpo: Any) -> None:
    error, calls = jpo("run", "model.max_length=12")
    assert "model.max_length=12 is shorter than an instruction of " in error
    assert "raise it to at least" in error
    assert calls == []  # before anything is embedded, paired or judged


def test_weights_that_are_a_pickle_are_found_before_any_stage(jpo: Any, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(BASE_MODEL / "config.json", folder)
    torch.save({}, folder / "pytorch_model.bin")
    error, calls = jpo("run", f"model.model_name_or_path={folder}", "seed=5")
    assert f"model.model_name_or_path: {folder}: no model.safetensors; pickled weights are not loaded" in error
    assert calls == []


def test_an_engine_that_is_not_installed_is_found_before_any_stage(jpo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    error, calls = jpo("run", "sample.engine=vllm", "seed=5")
    assert "sample.engine: vllm is not installed" in error
    assert calls == []


def test_samples_longer_than_the_model_takes(jpo: Any) -> None:
    error, calls = jpo("run", "sample.max_new_tokens=500")
    assert "sample.max_new_tokens=500: the model takes 512 tokens and the longest prompt has " in error
    assert calls == []


def test_proxy_pairs_without_labels(jpo: Any) -> None:
    error, _ = jpo("run", "pairs.joint.strategy=proxy", "judge.annotator=labels", "evaluate=null")
    assert "pairs.joint.strategy: proxy needs labelled comparisons in items.train; there are none" in error


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("[sft, jpo2]", "sample.models: no model `jpo2`; there are sft, jpo, dpo"),
        ("[jpo2, sft, kto]", "sample.models: no model `jpo2`, `kto` (2 of 3 are none); there are sft, jpo, dpo"),
        ("[]", "`sample.models`: List should have at least 1 item"),
        ("[jpo, jpo]", "sample.models: has the same value twice"),
    ],
)
def test_models_to_sample_that_are_not_there(jpo: Any, models: str, message: str) -> None:
    error, _ = jpo("run", f"sample.models={models}")
    assert message in error


def test_an_adapter_of_another_base_is_neither_sampled_nor_scored(jpo: Any, run_dir: Path) -> None:
    """The folder of one run's adapter holds another run's: its weights fit, its base has other weights."""
    folder = run_dir / "train" / "jpo"
    assert read_json(folder / "base_model.json")["model"].endswith("/run/sft")
    write_json(folder / "base_model.json", {"model": "/runs/other/sft", "weights": "0" * 16, "load_in_4bit": False})
    for stage, *overrides in (("sample", "sample.seed=5"), ("evaluate", "evaluate.policies=true")):
        error, calls = jpo(stage, *overrides)
        assert f"jpo: {folder} was trained on /runs/other/sft, and not on {run_dir / 'sft'}; use the base that" in error
        assert calls == []


def test_an_adapter_from_elsewhere_is_known_by_its_base_and_its_shapes(jpo: Any, run_dir: Path) -> None:
    """As peft and TRL leave one: with the name of the base, and no record of its weights."""
    folder = run_dir / "train" / "jpo"
    (folder / "base_model.json").unlink()
    manifest = read_json(folder / "manifest.json")
    manifest["files"].pop("base_model.json")
    write_json(folder / "manifest.json", manifest)
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": "org/base-1b"})
    error, _ = jpo("sample", "sample.seed=5")
    assert f"{folder} was trained on org/base-1b, and not on {run_dir / 'sft'}; where both are the same" in error
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": str(run_dir / "sft")})
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.lora_A.weight"))
    save_file(weights | {name: weights[name][:, :-8].contiguous()}, folder / "adapter_model.safetensors")
    error, calls = jpo("sample", "sample.seed=5")
    assert (
        f"{folder} does not fit {run_dir / 'sft'}: model.layers.0.self_attn.q_proj has 128 inputs there and 120"
        in error
    )
    assert calls == []


def test_a_policy_whose_base_was_trained_again_does_not_select(jpo: Any, run_dir: Path, tmp_path: Path) -> None:
    policy = shutil.copytree(run_dir / "train" / "jpo", tmp_path / "policy")
    record = read_json(policy / "base_model.json")
    write_json(policy / "base_model.json", record | {"weights": "0" * 16})
    selection = f"{{budget: 10, strategy: margin, policy: {policy}}}"
    error, calls = jpo("judge", f"judge.selection={selection}")
    assert f"judge.selection.policy: {policy} was trained on {record['model']}, as it was then" in error
    write_json(
        policy / "adapter_config.json", read_json(policy / "adapter_config.json") | {"base_model_name_or_path": "/gone"}
    )
    error, calls = jpo("judge", f"judge.selection={selection}")
    assert f"{policy / 'adapter_config.json'}: base_model_name_or_path: /gone: no such folder" in error
    assert calls == []


def test_a_moved_run_samples_and_scores_its_adapters(run_dir: Path, tmp_path: Path, cluster: Cluster) -> None:
    """The base's path in the adapters leads nowhere; their records and the run's own SFT model agree."""
    moved = run_dir.rename(tmp_path / "moved")
    for name in ("jpo", "dpo"):
        path = moved / "train" / name / "adapter_config.json"
        write_json(path, read_json(path) | {"base_model_name_or_path": "/gone"})
    run(small_config(evaluate={"policies": True}), moved)
    assert cluster.calls == ["evaluate: log_ratio of 2"]


@pytest.mark.parametrize("stage", ["judge", "evaluate"])
def test_a_judge_that_answers_nothing_ends_the_stage(
    jpo: Any, run_dir: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    manifest = RunDir(run_dir).require(stage, stage).fingerprint
    section = "judge" if stage == "judge" else "evaluate.judge"
    with endpoint(faults={"empty": 1.0}) as server:
        keys = f"{{annotator: openai, base_url: {server.url}, max_answer_tokens: 8}}"
        error, _ = jpo(stage, f"{section}={keys}")
    assert "verdicts of gpt-3.5-turbo-0125 are invalid: the answer is neither of the two, twice (" in error
    assert "; mend that, or name another judge" in error
    if stage == "judge":
        assert "judge: 120 of 120 verdicts" in error
    assert RunDir(run_dir).require(stage, stage).fingerprint == manifest  # what was there before stands


def test_empty_responses_count_from_the_sample_to_the_report(run_dir: Path, cluster: Cluster) -> None:
    """Every letter ends a response, so all are empty; the oracle gives nothing for them, and n holds them all."""
    stop = [*string.ascii_letters, *string.digits]
    sample = {"engine": "transformers", "temperatures": [0.7], "max_new_tokens": 16, "stop": stop}
    shown = run(small_config(sample=sample), run_dir)
    rows = records.read_table(run_dir / "sample" / "samples.parquet", records.SAMPLES).to_pylist()
    assert {row["response"] for row in rows} == {""}
    counts = {name: read_json(run_dir / name / "manifest.json")["counts"] for name in ("sample", "evaluate")}
    assert counts["sample"]["empty responses"] == counts["evaluate"]["empty responses"] == 18
    models = read_json(run_dir / "evaluate" / "win_rates.json")["models"]
    assert {name: (entry["n"], entry["empty"]) for name, entry in models.items()} == dict.fromkeys(models, (6, 6))
    assert "empty responses, judged as they are: sft 6, jpo 6, dpo 6" in " ".join(shown.split())
    page = (run_dir / "report" / "index.html").read_text()
    table = page[page.index("Verdicts on all temperatures") :].partition("</table>")[0]
    assert re.findall(r"<th[^>]*>(\w+)</th>", table)[-1] == "empty"
    assert re.findall(r"<td>(\d+)</td></tr>", table) == ["6", "6", "6"]
    assert len(cluster.calls) == 1


def test_test_instructions_without_gold_are_counted_where_they_are_left_out(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))
    rows = make_rows("test", 6, 0)
    golds = [{name: row[name] for name in ("instruction", "gold_response")} for row in rows[:4]]
    plain = [{name: row[name] for name in ("instruction", "response_0", "response_1")} for row in rows[4:]]
    sources = {"train": [{"path": "sandbox", "limit": 48}], "test": []}
    for name, content in (("gold", golds), ("plain", plain)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        sources["test"].append({"path": str(path)})
    shown = run(
        small_config(items=sources),
        tmp_path / "run",
        ["items", "pairs", "judge", "sft", "reference", "train", "sample"],
    )
    assert "instructions 4, left out without gold 2" in shown
    assert cluster.calls[-1] == "sample 12 with transformers"
