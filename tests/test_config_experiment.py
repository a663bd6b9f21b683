"""Experiments: which runs and trainings a grid gives, and what is wrong with one in one line."""

from pathlib import Path

import pytest
import yaml

from jpo_ray.config_experiment import Experiment, load_experiment, shown_settings
from jpo_ray.errors import InputError

EXPERIMENTS = sorted((Path(__file__).parent.parent / "configs" / "experiments").glob("*.yaml"))
BASE = {
    "items": {"train": [{"path": "sandbox"}]},
    "model": {"model_name_or_path": "sandbox"},
    "train": [{"name": "jpo"}, {"name": "dpo", "objective": "dpo", "protocols": ["conditional"]}],
}


def experiment(folder: Path, overrides: list[str] | None = None, **sections: object) -> Experiment:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE, sort_keys=False))
    (folder / "experiment.yaml").write_text(yaml.safe_dump({"base": "base.yaml", **sections}, sort_keys=False))
    return load_experiment(folder / "experiment.yaml", overrides or [])


@pytest.mark.parametrize("path", EXPERIMENTS, ids=[path.name for path in EXPERIMENTS])
def test_every_shipped_experiment_is_laid_out(path: Path) -> None:
    runs = load_experiment(path, []).runs
    assert all(run.config.evaluate is not None for run in runs)
    assert len({run.name for run in runs}) == len(runs)
    assert sum(len(run.trained) for run in runs) >= 3


def test_keys_of_entries_multiply_entries_and_others_runs(tmp_path: Path) -> None:
    found = experiment(
        tmp_path,
        grid={
            "train.jpo.max_train_comparisons": [100, 1000],
            "train.*.seed": [0, 1],
            "pairs.joint.strategy": ["random", "similar"],
        },
    )
    assert [run.name for run in found.runs] == ["random", "similar"]
    for run in found.runs:
        entries = {entry.name: (entry.max_train_comparisons, entry.seed) for entry in run.config.train}
        assert entries == {
            "jpo-100-s0": (100, 0), "jpo-100-s1": (100, 1), "jpo-1000-s0": (1000, 0), "jpo-1000-s1": (1000, 1),
            "dpo-s0": (None, 0), "dpo-s1": (None, 1),
        }  # fmt: skip
        assert run.config.pairs.joint is not None
        assert run.config.pairs.joint.strategy == run.name
    trained = found.runs[0].trained
    assert [shown_settings(each.settings, found.names) for each in trained[:3]] == [
        {"max_train_comparisons": 100}, {"max_train_comparisons": 100}, {"max_train_comparisons": 1000}
    ]  # fmt: skip
    assert [each.entry for each in trained] == ["jpo"] * 4 + ["dpo"] * 2


def test_keys_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    rates = {"sft.learning_rate": [1e-3, 2e-3], "train.*.learning_rate": [1e-4, 2e-4], "train.jpo.beta": [0.1]}
    found = experiment(tmp_path, grid=rates)
    assert list(found.names.values()) == ["sft.learning_rate", "train.learning_rate", "beta"]
    run = found.runs[1]
    assert shown_settings(run.settings | run.trained[0].settings, found.names) == {
        "sft.learning_rate": 2e-3, "train.learning_rate": 1e-4, "beta": 0.1
    }  # fmt: skip
    of_entries = {"train.jpo.learning_rate": [1e-4], "train.dpo.learning_rate": [2e-4]}
    assert set(experiment(tmp_path, grid=of_entries).names.values()) == {"learning_rate"}


def test_a_sign_tells_runs_apart(tmp_path: Path) -> None:
    found = experiment(tmp_path, grid={"pairs.joint.min_similarity": [-0.5, 0.5]})
    assert [run.name for run in found.runs] == ["minus0.5", "0.5"]


def test_steps_like_means_the_counterpart(tmp_path: Path) -> None:
    like = {"train": [*BASE["train"], BASE["train"][1] | {"name": "longer", "steps_like": "jpo"}]}  # type: ignore[index]
    found = experiment(tmp_path, override=like, grid={"train.*.seed": [0, 1]})
    assert {e.name: e.steps_like for e in found.runs[0].config.train if e.steps_like} == {
        "longer-s0": "jpo-s0", "longer-s1": "jpo-s1"
    }  # fmt: skip
    with pytest.raises(InputError, match="longer-s0 has 2 trainings of jpo to be like"):
        experiment(tmp_path, override=like, grid={"train.jpo.beta": [0.1, 1.0], "train.longer.seed": [0]})


def test_overrides_hold_for_all_runs(tmp_path: Path) -> None:
    found = experiment(tmp_path, ["seed=5", "sft=null"], override={"seed": 4}, grid={"train.*.seed": [0]})
    assert [(run.config.seed, run.config.sft) for run in found.runs] == [(5, None)]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "`grid` is required"),
        ({"grid": {}}, "grid"),
        ({"grid": {"seed": []}}, "grid.seed: needs values, each of them once"),
        ({"grid": {"seed": [1, 1]}}, "grid.seed: needs values, each of them once"),
        ({"grid": {"items.train": [[{"path": "a b"}], [{"path": "a_b"}]]}}, "two runs would both be called path_a_b"),
        ({"grid": {"train.kto.beta": [1.0]}}, "grid.train.kto.beta: no entry of `train` has this name"),
        ({"grid": {"train.jpo.betta": [1.0]}}, "did you mean `beta`"),
        ({"grid": {"seed": [0]}, "bass": 1}, "unknown key `bass`; did you mean `base`?"),
        ({"grid": {"seed": [0]}, "base": "none.yaml"}, "none.yaml: no such file"),
    ],
)
def test_bad_experiments_are_one_line(sections: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        experiment(tmp_path, **sections)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
