"""What is made, what stands, and what is made again when something changes."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.events import scalars
from safetensors.numpy import load_file

from jpo_ray import records
from jpo_ray.errors import InputError
from jpo_ray.files import file_hashes, read_json
from jpo_ray.pipeline.context import Context
from jpo_ray.runs import RunDir
from pipeline.conftest import Finished
from pipeline.inline import DPO, JPO, LIMITS, Cluster, run, small_config

DATA = ["items", "embeddings", "pairs", "judge"]
ARTIFACTS = [*DATA, "sft", "reference", "train/jpo", "train/dpo", "sample", "evaluate", "report"]


def fingerprints(run_dir: Path) -> dict[str, str]:
    found = {name: RunDir(run_dir).manifest(name) for name in ARTIFACTS}
    return {name: manifest.fingerprint for name, manifest in found.items() if manifest}


def changed(before: dict[str, str], run_dir: Path) -> list[str]:
    after = fingerprints(run_dir)
    return [name for name in ARTIFACTS if before[name] != after[name]]


def test_every_artifact_has_a_manifest_with_the_hashes_of_its_files(finished: Finished) -> None:
    for name in ARTIFACTS:
        manifest = read_json(finished.run_dir / name / "manifest.json")
        files = file_hashes(finished.run_dir / name)
        files.pop("manifest.json")
        assert manifest["files"] == files != {}
        assert manifest["artifact"] == name
        assert manifest["seconds"] >= 0
    assert sorted(path.name for path in (finished.run_dir / ".building").iterdir()) == []
    assert not (finished.run_dir / "lease.json").exists()


def compared(run_dir: Path) -> int:
    """Items in decisive comparisons."""
    rows = records.read_table(run_dir / "judge" / "preferences.parquet", records.PREFERENCES).to_pylist()
    return len({row[side] for row in rows for side in ("chosen", "rejected")})


def test_the_stages_ask_the_cluster_in_order(finished: Finished) -> None:
    scored = f"score {compared(finished.run_dir)}"
    assert finished.calls == [
        "embed", "tiles", "sft", scored, "train-jpo", "train-dpo", "sample 18 with transformers",
    ]  # fmt: skip


def test_the_numbers_of_a_small_run(finished: Finished) -> None:
    """48, 12 and 6 instructions with two responses each; as many joint pairs as D_S has items."""
    counts = {name: read_json(finished.run_dir / name / "manifest.json")["counts"] for name in ARTIFACTS}
    for split, count in LIMITS.items():
        assert counts["items"][f"{split}_instructions"] == count
        assert counts["items"][f"{split}_items"] == 2 * count
    assert counts["embeddings"] == {
        "instructions": 66, "dimensions": 12, "from cache": 0, "longer than the encoder reads": 0,
        "near-duplicate pairs": 0, "instructions that leak": 0,
    }  # fmt: skip
    assert counts["pairs"] == {
        "train conditional": 48, "train joint": 48, "validation conditional": 12, "validation joint": 12,
    }  # fmt: skip
    assert counts["judge"]["judgments"] == 120
    assert counts["sft"]["steps"] == 3
    assert counts["reference"]["scored now"] == counts["reference"]["items"] == compared(finished.run_dir)
    assert 100 < counts["reference"]["items"] < 120  # no test items, and none of ties alone
    comparisons = counts["train/jpo"]["comparisons"]
    assert counts["train/jpo"]["steps"] == -(-comparisons // 16)
    assert counts["train/dpo"]["steps"] == counts["train/jpo"]["steps"]  # steps_like: jpo
    assert counts["train/dpo"]["comparisons"] < comparisons
    assert counts["sample"]["samples"] == counts["evaluate"]["judgments"] == 18


def test_trainings_and_win_rates_are_in_event_files(finished: Finished) -> None:
    rates = read_json(finished.run_dir / "evaluate" / "win_rates.json")["models"]
    for name, folder in (("sft", "sft"), ("jpo", "train/jpo"), ("dpo", "train/dpo")):
        state = read_json(finished.run_dir / folder / "trainer_state.json")
        logs = finished.run_dir / "logs" / name
        losses = [(entry["step"], pytest.approx(entry["loss"])) for entry in state["log_history"] if "loss" in entry]
        assert scalars(logs)["train/loss"] == losses != []
        found = scalars(logs / "evaluate")
        for of, rate in rates[name]["win_rate"].items():
            assert found[f"test/win_rate/{of}"] == [(state["global_step"], pytest.approx(rate))]


def test_comparisons_that_judgments_imply_are_trained_on_too(run_dir: Path, cluster: Cluster) -> None:  # noqa: ARG001
    """48 items with 6 joint comparisons each. What the fit is sure of is trained on too, with soft labels."""
    config = small_config(
        pairs={"joint": {"budget": 144}},
        judge={"annotator": "sandbox", "noise": 0.05, "closure": {"per_item": 2, "min_probability": 0.7}},
        train=[JPO],
    )
    shown = run(config, run_dir, ["pairs", "judge", "reference", "train"])
    counts = {name: read_json(run_dir / name / "manifest.json")["counts"] for name in ("judge", "train/jpo")}
    rows = records.read_table(run_dir / "judge" / "preferences.parquet", records.PREFERENCES).to_pylist()
    soft = [row for row in rows if row["probability"] < 1]
    assert counts["judge"]["implied"] == len(soft) > 20
    assert len(rows) == counts["judge"]["preferences"] + len(soft)
    assert {row["split"] for row in soft} == {"train"}
    assert min(row["probability"] for row in soft) >= 0.7
    assert counts["train/jpo"]["comparisons"] == sum(row["split"] == "train" for row in rows)
    strengths = records.read_table(run_dir / "judge" / "strengths.parquet", records.STRENGTHS).to_pylist()
    strength = {row["item_id"]: row["strength"] for row in strengths}
    assert all(strength[row["chosen"]] > strength[row["rejected"]] for row in soft)
    assert sum(row["comparisons"] for row in strengths) == 2 * (144 + 48)
    assert f"implied {len(soft)}" in shown


def test_samples_hold_both_temperatures_and_seeds_that_models_share(finished: Finished) -> None:
    rows = records.read_table(finished.run_dir / "sample" / "samples.parquet", records.SAMPLES).to_pylist()
    assert [row["model"] for row in rows] == ["sft"] * 6 + ["jpo"] * 6 + ["dpo"] * 6
    assert {(row["temperature"], row["effective_temperature"], row["engine"]) for row in rows} == {
        (0.7, 0.7, "transformers")
    }
    seeds = [[row["seed"] for row in rows if row["model"] == name] for name in ("sft", "jpo", "dpo")]
    assert seeds[0] == seeds[1] == seeds[2]
    assert len(set(seeds[0])) == 6


def test_joint_pairs_join_members_of_d_s_with_different_instructions(finished: Finished) -> None:
    items = records.read_table(finished.run_dir / "items" / "items.parquet", records.ITEMS).to_pylist()
    by_id = {item["item_id"]: item for item in items}
    pairs = records.read_table(finished.run_dir / "pairs" / "pairs.parquet", records.PAIRS).to_pylist()
    assert len({pair["pair_id"] for pair in pairs}) == 120
    for pair in pairs:
        a, b = by_id[pair["item_a"]], by_id[pair["item_b"]]
        assert a["split"] == b["split"] == pair["split"]
        assert pair["item_a"] < pair["item_b"]
        same = a["instruction_id"] == b["instruction_id"]
        assert same == (pair["protocol"] == "conditional")
        assert same or (a["sft"] and b["sft"])
    joint = [pair for pair in pairs if pair["protocol"] == "joint" and pair["split"] == "train"]
    used = {item for pair in joint for item in (pair["item_a"], pair["item_b"])}
    assert used == {item["item_id"] for item in items if item["sft"] and item["split"] == "train"}


def test_a_second_run_skips_everything_without_ray(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "ray", lambda _: pytest.fail("Ray was started"))
    before = file_hashes(run_dir)
    started = time.monotonic()
    shown = run(small_config(), run_dir)
    assert time.monotonic() - started < 5
    assert shown.count("stands already") == len(ARTIFACTS)
    assert file_hashes(run_dir) == before


def test_another_beta_trains_that_entry_alone(run_dir: Path, cluster: Cluster) -> None:
    before = fingerprints(run_dir)
    run(small_config(train=[JPO, DPO | {"beta": 0.4}]), run_dir)
    assert cluster.calls == ["train-dpo", "sample 18 with transformers"]
    assert changed(before, run_dir) == ["train/dpo", "sample", "evaluate", "report"]


def test_an_entry_whose_steps_follow_another_is_trained_with_it(run_dir: Path, cluster: Cluster) -> None:
    run(small_config(train=[JPO | {"num_train_epochs": 2}, DPO]), run_dir)
    assert cluster.calls == ["train-jpo", "train-dpo", "sample 18 with transformers"]


def test_a_lost_reference_comes_from_the_cache_without_a_forward_pass(run_dir: Path, cluster: Cluster) -> None:
    kept = (run_dir / "reference" / "reference.parquet").read_bytes()
    before = fingerprints(run_dir)
    shutil.rmtree(run_dir / "reference")
    shown = run(small_config(train=[JPO | {"beta": 0.3}, DPO]), run_dir)
    assert "every item was in the reference cache: no forward pass" in shown
    assert not [call for call in cluster.calls if call.startswith("score")]
    assert (run_dir / "reference" / "reference.parquet").read_bytes() == kept
    assert changed(before, run_dir)[0] == "train/jpo"


def test_another_budget_pairs_and_judges_again_and_scores_what_is_new(run_dir: Path, cluster: Cluster) -> None:
    before = fingerprints(run_dir)
    shown = run(small_config(pairs={"joint": {"strategy": "random", "budget": 20}}), run_dir)
    assert cluster.calls == ["tiles", "train-jpo", "train-dpo", "sample 18 with transformers"]
    assert "every item was in the reference cache: no forward pass" in shown
    assert changed(before, run_dir) == [
        "pairs", "judge", "reference", "train/jpo", "train/dpo", "sample", "evaluate", "report",
    ]  # fmt: skip
    assert RunDir(run_dir).require("pairs", "pairs").counts["train joint"] == 20


def test_another_seed_makes_everything_again(run_dir: Path, cluster: Cluster) -> None:
    before = fingerprints(run_dir)
    run(small_config(seed=1), run_dir, ["items", "pairs", "judge", "sft"])
    assert changed(before, run_dir) == [*DATA, "sft"]
    assert cluster.calls == ["embed", "tiles", "sft"]
    with pytest.raises(InputError, match=r"`reference` was made with another config or other input; run `jpo refer"):
        run(small_config(seed=1), run_dir, ["train"])


@pytest.mark.parametrize(
    ("artifact", "calls"),
    [
        ("items", []), ("embeddings", ["embed", "tiles"]), ("pairs", ["tiles"]), ("judge", []), ("report", []),
        ("sample", ["sample 18 with transformers"]), ("evaluate", []), ("train/dpo", ["train-dpo"]),
    ],
)  # fmt: skip
def test_a_lost_artifact_is_made_again_the_same_and_nothing_else(
    run_dir: Path, cluster: Cluster, artifact: str, calls: list[str]
) -> None:
    before = file_hashes(run_dir)
    shutil.rmtree(run_dir / artifact)
    run(small_config(), run_dir)
    assert cluster.calls == calls
    same = {name for name, digest in file_hashes(run_dir).items() if before.get(name) == digest}
    # What tells times: manifests, the training log, and the report, made anew where the whole took another second.
    told = {name for name in before if name.startswith((f"{artifact}/", "report/"))}
    volatile = {name for name in told if name.endswith((".json", ".html", ".md"))}
    volatile |= {name for name in before if name.startswith("logs/")}  # named by the time
    assert before.keys() - same <= volatile


def test_an_interrupted_training_goes_on_from_its_checkpoint(
    finished: Finished, run_dir: Path, cluster: Cluster
) -> None:
    """The end comes after 5 steps; the checkpoint of step 4 is there, and the result is that of one go."""
    expected = load_file(finished.run_dir / "train" / "jpo" / "adapter_model.safetensors")
    shutil.rmtree(run_dir / "train" / "jpo")
    cluster.dies_at_step = 5
    with pytest.raises(KeyboardInterrupt):
        run(small_config(), run_dir)
    (building,) = (run_dir / ".building").iterdir()
    assert building.name.startswith("train-jpo-")
    assert (building / "checkpoint-4").is_dir()
    assert not (run_dir / "train" / "jpo").exists()
    run(small_config(), run_dir)
    assert cluster.calls == ["train-jpo", "train-jpo"]
    assert list((run_dir / ".building").iterdir()) == []
    resumed = load_file(run_dir / "train" / "jpo" / "adapter_model.safetensors")
    assert all(np.array_equal(resumed[name], expected[name]) for name in expected)


def test_what_is_left_of_another_config_is_not_resumed(run_dir: Path, cluster: Cluster) -> None:
    shutil.rmtree(run_dir / "train" / "jpo")
    cluster.dies_at_step = 5
    with pytest.raises(KeyboardInterrupt):
        run(small_config(), run_dir, ["train"])
    config = small_config(train=[JPO | {"beta": 0.9}, DPO])
    run(config, run_dir, ["train"])
    state = read_json(run_dir / "train" / "jpo" / "trainer_state.json")
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry][:3] == [1, 2, 3]
    assert list((run_dir / ".building").iterdir()) == []


def test_kto_has_each_item_scored_with_a_response_to_another_instruction(run_dir: Path, cluster: Cluster) -> None:
    kto = JPO | {"name": "kto", "objective": "kto", "protocols": ["conditional"]}
    run(small_config(train=[JPO, DPO, kto]), run_dir, ["reference", "train"])
    assert cluster.calls[0].startswith("score ")
    rows = records.read_table(run_dir / "reference" / "reference.parquet", records.REFERENCE).to_pylist()
    items = records.read_table(run_dir / "items" / "items.parquet", records.ITEMS).to_pylist()
    of = {item["item_id"]: item["instruction_id"] for item in items}
    mismatched = [row for row in rows if row["item_id"] != row["response_of"]]
    preferences = records.read_table(run_dir / "judge" / "preferences.parquet", records.PREFERENCES).to_pylist()
    own = [row for row in preferences if row["protocol"] == "conditional" or row["split"] == "validation"]
    matched = {row[side] for row in own for side in ("chosen", "rejected")}
    assert {row["item_id"] for row in mismatched} == matched
    assert len(rows) == compared(run_dir) + len(matched)
    assert len(matched) - 12 < int(cluster.calls[0].removeprefix("score ")) <= len(matched)  # one may be an item
    assert all(of[row["item_id"]] != of[row["response_of"]] for row in mismatched)
    assert "train-kto" in cluster.calls


def test_a_stage_needs_what_comes_before_it(tmp_path: Path, cluster: Cluster) -> None:
    with pytest.raises(InputError, match=r"no `items` yet; run `jpo items` first \(or `jpo run` for all of it\)"):
        run(small_config(), tmp_path / "run", ["judge"])
    run(small_config(), tmp_path / "run", ["items"])
    with pytest.raises(InputError, match=r"no `pairs` yet; run `jpo pairs` first"):
        run(small_config(), tmp_path / "run", ["judge"])
    assert cluster.calls == []


def test_without_a_held_out_split_a_judge_or_joint_pairs(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))  # rounds of the same SFT model may have scored some items
    items = {split: [{"path": "sandbox", "limit": LIMITS[split]}] for split in ("train", "test")}
    config = small_config(items=items, pairs={"joint": None}, train=[JPO], evaluate=None)
    shown = run(config, tmp_path / "run")
    assert "No win rates: `evaluate` is off in the config or has not run." in shown
    assert "held-out" not in shown
    assert not (tmp_path / "run" / "evaluate").exists()
    assert cluster.calls == [
        "embed",
        "tiles",
        "sft",
        f"score {compared(tmp_path / 'run')}",
        "train-jpo",
        "sample 12 with transformers",
    ]


def test_without_sft_the_base_model_is_the_reference(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))  # others score the same model's same items
    config = small_config(sft=None, train=[JPO], sample=None, evaluate=None)
    run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "sft").exists()
    assert cluster.calls == ["embed", "tiles", f"score {compared(tmp_path / 'run')}", "train-jpo"]
    adapter: dict[str, Any] = read_json(tmp_path / "run" / "train" / "jpo" / "adapter_config.json")
    assert adapter["base_model_name_or_path"].endswith("base_model")
