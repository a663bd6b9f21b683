"""On-policy rounds: what each is made from, what it leaves, and where it goes on after a stop."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jpo_ray import records
from jpo_ray.config import RunConfig
from jpo_ray.data.tokens import tokenize
from jpo_ray.engine.jobs import layout_of
from jpo_ray.engine.model import load_model, load_tokenizer
from jpo_ray.engine.scoring import make_scorer
from jpo_ray.engine.step import score_all
from jpo_ray.errors import InputError
from jpo_ray.files import read_json
from pipeline.inline import DPO, JPO, LIMITS, Cluster, install, run, small_config


def config_of(**rounds: Any) -> RunConfig:
    return small_config(train=[JPO | {"lora_dropout": 0.0}], rounds={"count": 2} | rounds)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[Path, list[str], str]:  # noqa: ARG001
    """A run of two rounds whose reference moves: its folder, what it asked of the cluster, what it said."""
    folder = tmp_path_factory.mktemp("rounds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JPO_CACHE", str(folder / "cache"))
        cluster = install(patch)
        shown = run(config_of(), folder / "run")
    return folder / "run", cluster.calls, shown


def items_of(run_dir: Path) -> list[dict[str, Any]]:
    return records.read_table(run_dir / "items" / "items.parquet", records.ITEMS).to_pylist()


def reference_scores(run_dir: Path) -> dict[str, tuple[float, float]]:
    rows = records.read_table(run_dir / "reference" / "reference.parquet", records.REFERENCE).to_pylist()
    return {row["item_id"]: (row["instruction_logprob"], row["response_logprob"]) for row in rows}


def worst_difference(run_dir: Path, model: Path) -> float:
    """Of a round's reference log-probs to those of a model, in nats."""
    found = reference_scores(run_dir)
    items = [row for row in items_of(run_dir) if row["item_id"] in found]
    texts = ([row["instruction"] for row in items], [row["response"] for row in items])
    tokens = tokenize(load_tokenizer(model), layout_of(config_of().model), *texts)
    scorer = make_scorer(load_model(model, dtype="float32"))
    scores = score_all(scorer, tokens, np.arange(len(items)), max_tokens=4096).numpy()
    return float(np.abs(scores - np.array([found[row["item_id"]] for row in items])).max())


def test_each_round_samples_judges_and_trains(moved: tuple[Path, list[str], str]) -> None:
    run_dir, calls, shown = moved
    assert [call.split()[0] for call in calls] == [
        "sft", *["sample", "embed", "tiles", "score", "train-jpo-1"], *["sample", "embed", "tiles", "score",
        "train-jpo-2"], "sample",
    ]  # fmt: skip
    assert calls[1] == f"sample {2 * LIMITS['train']} with transformers"
    assert calls[-1] == f"sample {3 * LIMITS['test']} with transformers"  # sft and both rounds, together
    assert "round 1 of 2" in shown
    assert not (run_dir / "pairs").exists()
    for number in (1, 2):
        folder = run_dir / "rounds" / str(number)
        kinds = {
            row["protocol"]
            for row in records.read_table(folder / "judge/preferences.parquet", records.PREFERENCES).to_pylist()
        }
        assert kinds == {"conditional", "joint"}
        samples = records.read_table(folder / "drawn" / "samples.parquet", records.SAMPLES).to_pylist()
        assert {row["model"] for row in samples} == {"sft" if number == 1 else "jpo-1"}
        said = {(row["instruction"], row["response"]) for row in samples if row["response"].strip()}
        assert {(row["instruction"], row["response"]) for row in items_of(folder) if row["split"] == "train"} == said
        assert (folder / "report" / "index.html").exists()


def test_a_moved_reference_is_the_policy_before(moved: tuple[Path, list[str], str]) -> None:
    run_dir, _, _ = moved
    assert worst_difference(run_dir / "rounds" / "1", run_dir / "sft") < 2e-3
    assert worst_difference(run_dir / "rounds" / "2", run_dir / "train" / "jpo-1") < 2e-3
    assert worst_difference(run_dir / "rounds" / "2", run_dir / "sft") > 0.01
    for name in ("jpo-1", "jpo-2"):
        files = {path.name for path in (run_dir / "train" / name).iterdir()}
        assert files >= {"model.safetensors", "config.json", "trainer_state.json", "tokenizer.json"}
        assert "adapter_config.json" not in files


def test_the_models_of_all_rounds_are_evaluated_together(moved: tuple[Path, list[str], str]) -> None:
    run_dir, _, shown = moved
    models = read_json(run_dir / "evaluate" / "win_rates.json")["models"]
    assert sorted(models) == ["jpo-1", "jpo-2", "sft"]
    assert "jpo-2" in shown.split("Win rate")[-1]
    assert "jpo-2" in (run_dir / "report" / "index.html").read_text()


def test_a_finished_run_stands_and_another_round_is_added_to_it(
    moved: tuple[Path, list[str], str], tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JPO_CACHE", str(moved[0].parent / "cache"))
    run_dir = shutil.copytree(moved[0], tmp_path / "run")
    assert run(config_of(), run_dir).count("stands already") == 7
    assert cluster.calls == []
    shown = run(config_of(count=3), run_dir)
    assert "train/jpo-2 stands already" in shown
    assert [call.split()[0] for call in cluster.calls] == [
        "sample", "embed", "tiles", "score", "train-jpo-3", "sample",
    ]  # fmt: skip


def test_a_stopped_round_goes_on_where_it_was(
    moved: tuple[Path, list[str], str], cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second round's training: the samples, judgments and first steps stay; the result is the same."""
    run_dir = moved[0]
    monkeypatch.setenv("JPO_CACHE", str(run_dir.parent / "cache"))
    before = load_file(run_dir / "train" / "jpo-2" / "model.safetensors")
    shutil.rmtree(run_dir / "train" / "jpo-2")
    shutil.rmtree(run_dir / "rounds" / "2" / "train")
    cluster.dies_at_step = 3
    with pytest.raises(KeyboardInterrupt):
        run(config_of(), run_dir)
    assert list((run_dir / "rounds" / "2" / ".building").glob("train-jpo-2-*/checkpoint-2"))
    run(config_of(), run_dir)
    assert cluster.calls == ["train-jpo-2", "train-jpo-2"]
    after = load_file(run_dir / "train" / "jpo-2" / "model.safetensors")
    assert all(np.allclose(after[name], before[name], atol=1e-6) for name in before)


def test_a_fixed_reference_stays_the_sft_model_and_the_adapter_goes_on(tmp_path: Path, cluster: Cluster) -> None:
    run_dir = tmp_path / "run"
    run(config_of(reference="fixed", instructions=30), run_dir)
    assert cluster.calls[1] == cluster.calls[6] == "sample 60 with transformers"
    drawn = [
        {row["instruction_id"] for row in items_of(run_dir / "rounds" / str(number)) if row["split"] == "train"}
        for number in (1, 2)
    ]
    assert len(drawn[0] | drawn[1]) == 48  # the second round begins where the first ended
    assert worst_difference(run_dir / "rounds" / "2", run_dir / "sft") < 2e-3
    for name in ("jpo-1", "jpo-2"):
        config = read_json(run_dir / "train" / name / "adapter_config.json")
        assert config["base_model_name_or_path"] == str((run_dir / "sft").resolve())
    first, second = (load_file(run_dir / "train" / name / "adapter_model.safetensors") for name in ("jpo-1", "jpo-2"))
    moved_by = max(float(np.abs(second[name] - first[name]).max()) for name in first)
    from_zero = max(float(np.abs(second[name]).max()) for name in first if "lora_B" in name)
    assert 0 < moved_by < from_zero


def test_a_round_leaves_out_the_instructions_that_the_run_does(tmp_path: Path, cluster: Cluster) -> None:  # noqa: ARG001
    """A validation instruction longer than `max_length`, which would end the round, is too long in it as well."""
    path = tmp_path / "validation.jsonl"
    rows = [{"prompt": text, "chosen": "la", "rejected": "no"} for text in ("sing", "sing " * 300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = {"train": [{"path": "sandbox", "limit": 16}], "validation": [{"path": str(path)}]}
    limits = {"max_instruction_tokens": 128}
    config = small_config(items=items | limits, train=[JPO], rounds=1, sample=None, evaluate=None)
    run(config, tmp_path / "run", ["items", "sft", "train"])
    round_dir = tmp_path / "run" / "rounds" / "1"
    for folder in (tmp_path / "run", round_dir):
        held_out = [row["instruction"] for row in items_of(folder) if row["split"] == "validation"]
        assert set(held_out) == {"sing"}
    assert {row["split"] for row in items_of(round_dir)} == {"train", "validation"}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"train": [JPO, DPO]}, "rounds follow one policy and `train` has 2 entries"),
        ({"judge": {"annotator": "labels"}}, "rounds judge fresh samples, which the data's labels say nothing of"),
        (
            {"pairs": {"joint": {"strategy": "proxy"}}},
            "strategy proxy needs labels, and fresh samples have none",
        ),
        ({"evaluate": {"policies": True}}, "evaluate.policies compares with one reference"),
        ({"sample": {"models": ["jpo"]}}, "no model `jpo`; there are sft, jpo-1, jpo-2"),
        ({"rounds": {"samples_per_instruction": 1}}, "greater than or equal to 2"),
    ],
)
def test_what_rounds_cannot_do_is_said_at_once(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        small_config(**({"train": [JPO], "rounds": 2} | sections))


def test_a_number_is_enough() -> None:
    rounds = small_config(train=[JPO], rounds=2).rounds
    assert rounds is not None
    assert (rounds.count, rounds.reference, rounds.samples_per_instruction) == (2, "moved", 2)
