"""`jpo plan`: its counts are those of a real run, it says what is missing, and it fetches and loads nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jpo_ray.cli import main
from jpo_ray.config_experiment import load_experiment
from jpo_ray.config_file import load_config, parse_config
from jpo_ray.files import read_json
from jpo_ray.pipeline.plan import make_plan
from jpo_ray.planning.plan import Plan
from jpo_ray.planning.show import WIDTH, plan_lines
from pipeline.conftest import Finished
from pipeline.inline import small_config

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "reference.yaml")  # which cannot run as it is


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the Hub's caches, no key, no token, and no way out."""
    from huggingface_hub import constants

    for name in ("OPENAI_API_KEY", "HF_TOKEN", "RAY_ADDRESS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the plan asked the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


def counts_of(finished: Finished, artifact: str) -> dict[str, Any]:
    counts: dict[str, Any] = read_json(finished.run_dir / artifact / "manifest.json")["counts"]
    return counts


def stage(plan: Plan, name: str) -> Any:
    return next(cost for cost in plan.stages if cost.name == name)


def test_counts_are_those_of_a_real_run(finished: Finished) -> None:
    plan = make_plan(small_config())
    items, pairs, judge = (counts_of(finished, name) for name in ("items", "pairs", "judge"))
    for name, split in plan.counts.splits.items():
        assert split.instructions == items[f"{name}_instructions"]
        assert split.items == items[f"{name}_items"]
        if name != "test":
            assert split.conditional == pairs[f"{name} conditional"]
            assert split.joint == pairs[f"{name} joint"]
    assert plan.counts.splits["test"].golds == items["test_gold"]
    assert plan.counts.fine_tuning == counts_of(finished, "sft")["items"] == items["train_sft"]
    of_pairs, of_samples = plan.judging
    assert of_pairs.comparisons == sum(judge[verdict] for verdict in ("a", "b", "tie", "invalid"))
    assert (
        of_samples.comparisons
        == counts_of(finished, "sample")["samples"]
        == counts_of(finished, "evaluate")["judgments"]
    )
    assert stage(plan, "sft").steps == counts_of(finished, "sft")["steps"]
    assert plan.missing == [line for line in plan.missing if line.startswith("vllm")]


def test_what_training_takes_is_near_a_real_run(finished: Finished) -> None:
    """Given the share of decisive judgments, steps agree; items of graph batches and tokens up to chance."""
    judge = counts_of(finished, "judge")
    pairs = counts_of(finished, "pairs")
    decisive = (judge["a"] + judge["b"]) / sum(pairs.values())
    plan = make_plan(small_config(plan={"decisive": decisive}))
    reference = counts_of(finished, "reference")
    assert stage(plan, "reference").items == pytest.approx(reference["items"], rel=0.1)
    assert stage(plan, "reference").tokens == pytest.approx(reference["tokens"], rel=0.1)
    trained = counts_of(finished, "train/jpo")
    assert sum(plan.counts.preferences.values()) == pytest.approx(trained["comparisons"], abs=8)  # type: ignore[arg-type]
    assert stage(plan, "train/jpo").steps == pytest.approx(trained["steps"], abs=1)
    assert stage(plan, "train/dpo").steps == stage(plan, "train/jpo").steps  # `steps_like`
    state = read_json(finished.run_dir / "train" / "jpo" / "trainer_state.json")
    assert stage(plan, "train/jpo").items / trained["comparisons"] == pytest.approx(
        trained["items_per_comparison"], rel=0.25
    )
    assert stage(plan, "train/jpo").tokens <= 1.1 * state["num_tokens"]  # where instructions are counted for each item


def test_a_label_decides_as_many_comparisons_as_a_run_trains_on(tmp_path: Path) -> None:
    """Two labelled instructions and one without; joint pairs by proxy and by labels."""
    same = [
        {"i_chosen": f"Name {n}.", "r_chosen": "Good.", "i_reject": f"Name {n}.", "r_reject": "Bad."} for n in range(3)
    ]
    other = {"i_chosen": "Name 0.", "r_chosen": "Good.", "i_reject": "Name 1.", "r_reject": "Good."}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*same, other]))
    values: dict[str, Any] = {
        "items": {"train": [{"path": str(path)}]},
        "model": {"model_name_or_path": "sandbox"},
        "judge": {"annotator": "labels"},
        "sample": None,
        "evaluate": None,
    }
    labelled = make_plan(parse_config(values | {"pairs": {"joint": {"strategy": "labelled"}}}, "test"))
    assert labelled.counts.preferences == {"conditional": 3, "joint": 1}
    assert labelled.counts.splits["train"].joint == 1
    short = {"joint": {"strategy": "labelled"}, "max_item_characters": 40}  # the template alone has 33
    assert make_plan(parse_config(values | {"pairs": short}, "test")).counts.preferences == {
        "conditional": 0,
        "joint": 0,
    }
    tokens = labelled.counts.tokens
    assert tokens.origin == "tokenized"
    limited = make_plan(parse_config(values | {"items": values["items"] | {"max_instruction_tokens": 5}}, "test"))
    assert limited.counts.splits["train"].instructions == 0


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_every_shipped_config_has_a_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With data, keys and GPUs missing as they are here it ends well, and its tables fit 80 columns."""
    assert main(["plan", "--config", str(path)]) == 0
    shown = capsys.readouterr().out
    tables = shown.partition("ASSUMED")[0].splitlines()
    assert max(map(len, tables)) <= WIDTH
    if "sandbox" in path.stem:
        assert "?" not in shown
    elif path.stem != "helpful_tiny":  # whose files lie beside a checkout, or not
        assert "?" not in shown
        assert "MISSING on this machine\n  - data of items." in shown
        assert "HF_TOKEN is not set" in shown


EXPERIMENTS = sorted((CONFIGS / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=[path.stem for path in EXPERIMENTS])
def test_every_shipped_experiment_has_a_plan(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each of its run directories, with all trainings that the grid makes there. It is no config to run."""
    runs = load_experiment(path, []).runs
    assert main(["plan", "--config", str(path), "items.train.0.limit=60", "items.test.0.limit=9"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Plan of ") == len(runs)
    assert f"{len(runs)} runs: what they have in common is made once" in shown or len(runs) == 1
    for run in runs:
        assert all(f"train/{entry.name}"[:20] in shown for entry in run.config.train)
    assert main(["plan", "--config", str(path), "--json", "items.train.0.limit=60", "items.test.0.limit=9"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert len(runs) == 1 or plans.keys() == {run.name for run in runs}
    assert main(["run", "--config", str(path), "--run-dir", "nowhere"]) == 2
    assert "is an experiment: `jpo scale --experiment` carries it out" in capsys.readouterr().err


def test_the_papers_recipe_in_numbers() -> None:
    """7.24 billion parameters to fine-tune, 4.7 million in an adapter; 9,400 + 8,500 labels give 560 steps an epoch."""
    plan = make_plan(load_config(CONFIGS / "helpful_released.yaml", ["plan.short_items=1"]))
    assert plan.parameters == 7_241_732_096
    jpo = stage(plan, "train/jpo")
    assert (jpo.trained, jpo.steps) == (4_718_592, 5 * 560)
    assert jpo.memory_gib < 40
    said = " ".join(plan.missing)
    for part in ("GPUs: the config asks for 1", "mistral_7b_sft_helpful, about 14.5 GB", "OPENAI_API_KEY is not set"):
        assert part in said


def test_what_is_missing_is_not_said_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "some-key")
    monkeypatch.setenv("HF_TOKEN", "some-token")
    config = small_config(
        judge={"annotator": "openai", "prompt_price": 1, "completion_price": 2}, cluster={"gpus_per_worker": 0}
    )
    plan = make_plan(config)
    assert not [line for line in plan.missing if "OPENAI" in line or "GPU" in line or "HF_TOKEN" in line]
    assert "some-key" not in json.dumps(plan.as_dict())
    assert plan.judging[0].cost == pytest.approx(
        (plan.judging[0].tokens - 16 * plan.judging[0].requests) / 1e6 + 32 * plan.judging[0].requests / 1e6  # type: ignore[operator]
    )


def test_too_little_memory_and_disk_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 2**20})())
    plan = make_plan(small_config(plan={"device_memory_gib": 0.1}), tmp_path / "run")
    said = " ".join(plan.missing)
    assert "memory: sft, reference, train/jpo, train/dpo, sample need up to" in said
    assert f"disk: 0 GiB for {tmp_path / 'run'}, 0 are free here" in said


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    path = CONFIGS / "sandbox.yaml"
    assert main(["plan", "--config", str(path), "--json", "items.train.0.limit=40"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["splits"]["train"]["instructions"] == 40
    assert [cost["name"] for cost in found["stages"]] == [
        "sft", "reference", "train/jpo", "train/dpo", "train/kto", "sample",
    ]  # fmt: skip


def test_a_broken_config_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("items: {train: [{path: sandbox}]}\nmodel: {}\n")
    assert main(["plan", "--config", str(path)]) == 2
    assert "model_name_or_path" in capsys.readouterr().err


def test_it_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from jpo_ray.cli import main; "
        f"assert main(['plan', '--config', {str(CONFIGS / 'sandbox.yaml')!r}, 'items.train.0.limit=40']) == 0; "
        "assert not {'torch', 'ray', 'transformers', 'vllm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_may_stop_early() -> None:
    """As `jpo plan ... | head -1` does."""
    command = (
        f"{sys.executable} -m jpo_ray.cli plan --config {CONFIGS / 'sandbox.yaml'} items.train.0.limit=40 | head -1"
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("Plan of")


def test_a_title_and_every_part_are_shown() -> None:
    shown = list(plan_lines(make_plan(small_config()), "a config"))
    heads = [line.split()[0] for line in shown if line[:1].isupper() and line.split()[0].isupper()]
    assert heads == ["DATA", "JUDGING", "STAGE", "ASSUMED", "MISSING"]
