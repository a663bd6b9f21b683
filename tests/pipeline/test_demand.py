"""What stages ask of the cluster: all of it is checked when the run first connects."""

import io
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jpo_ray.errors import InputError
from jpo_ray.pipeline import STAGES, run_stages
from jpo_ray.pipeline.context import Context
from jpo_ray.pipeline.demand import asked, check_resources
from jpo_ray.runs import RunDir
from pipeline.inline import small_config

ONE = {"CPU": 1.0}
REWARD = {"annotator": "reward_model", "model": "some/reward"}
VLLM = {"annotator": "vllm", "model": "some/judge", "tensor_parallel_size": 4}


def ray_of(*nodes: dict[str, float]) -> Any:
    total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    found = [{"Alive": True, "Resources": node} for node in nodes]
    return SimpleNamespace(nodes=lambda: found, cluster_resources=lambda: total)


def of(stage: str, ray: Any | None = None, **sections: Any) -> list[Any]:
    return list(asked(ray or ray_of({"CPU": 8.0}), small_config(**sections), stage))


def test_each_stage_by_hand() -> None:
    """Workers and actors share the eight cores of the one node, unless told what to take."""
    assert of("items") == of("report") == of("judge") == of("evaluate", evaluate=None) == []
    assert of("sft", cluster={"num_workers": 2}) == [[{"CPU": 4.0}] * 2]
    beside = {"num_workers": 2, "trainings_at_once": 2, "cpus_per_worker": 1}
    assert (of("sft", cluster=beside), of("train", cluster=beside)) == ([[ONE] * 2], [[ONE] * 4])
    stages = {"num_actors": 2, "stages": {"pairs": {"custom_resources": {"cpu_node": 0.5}, "num_actors": 1}}}
    assert of("pairs", cluster=stages) == [[{"CPU": 8.0, "cpu_node": 0.5}], [{"CPU": 1.0, "cpu_node": 0.5}]]
    assert of("reference", cluster=stages) == of("sample", cluster=stages) == [[{"CPU": 4.0}] * 2]


def test_models_that_judge_by_hand() -> None:
    """One after the other. An engine takes a GPU and a core for each part; actors that ask an endpoint take a core."""
    gpus = {"gpus_per_worker": 0.5, "cpus_per_worker": 2, "num_actors": 2}
    expected = [[{"GPU": 4.0, "CPU": 4.0}] * 2, [{"CPU": 2.0, "GPU": 0.5}] * 2]
    both = VLLM | {"also": [REWARD, {"annotator": "labels"}]}
    assert of("judge", judge=both, cluster=gpus) == expected
    assert of("evaluate", judge=both, cluster=gpus) == expected[:1]
    policies = {"judge": REWARD, "policies": True}
    assert of("evaluate", evaluate=policies, cluster=gpus) == expected[1:] * 2
    assert of("judge", judge={"annotator": "openai", "actors": 3}, cluster=gpus) == [[ONE] * 3]
    assert of("judge", judge={"annotator": "openai"}, cluster=gpus) == []


def context_of(folder: Path, ray: Any, *standing: str, **sections: Any) -> Context:
    def not_there(_: Context) -> Any:
        raise InputError("what it is made from is not there")

    specs = {stage: (lambda _: []) if stage in standing else not_there for stage in STAGES}
    return Context(RunDir(folder), small_config(**sections), Console(quiet=True), specs, ExitStack(), _ray=ray)


def test_stages_that_stand_and_clusters_that_grow_are_not_refused(tmp_path: Path) -> None:
    ray, cluster = ray_of({"CPU": 8.0, "GPU": 1.0}), {"stages": {"sample": {"gpus_per_worker": 8}}}
    message = r"^sample: asks for 1 x 8 CPU \+ 8 GPU, but the cluster has 8 CPU, 1 GPU on 1 node\(s\); lower cluster\."
    with pytest.raises(InputError, match=message):
        check_resources(context_of(tmp_path, ray, "pairs", cluster=cluster), list(STAGES))
    check_resources(context_of(tmp_path, ray, "sample", cluster=cluster), list(STAGES))
    check_resources(context_of(tmp_path, ray, cluster=cluster), ["pairs", "sft"])
    check_resources(context_of(tmp_path, ray, cluster=cluster | {"autoscaling": True}), list(STAGES))


def test_what_a_stage_is_made_from_is_looked_at_again_when_its_turn_comes(tmp_path: Path) -> None:
    """A report tells of all that stands by then: made as things looked at the start, it was made again next time."""
    context = context_of(tmp_path, ray_of({"CPU": 8.0}), *STAGES)
    check_resources(context, list(STAGES))
    later: list[Any] = [object()]
    context.specs.update(dict.fromkeys(STAGES, lambda _: later))
    assert all(context.specs_of(stage) is later for stage in STAGES)


def test_rounds_sample_and_judge_too(tmp_path: Path) -> None:
    ray, rounds = ray_of({"CPU": 8.0}), {"rounds": 2, "sample": None, "evaluate": None, "train": [{}]}
    for stage in ("sample", "pairs", "reference"):
        config = rounds | {"cluster": {"stages": {stage: {"custom_resources": {"nowhere": 1}}}}}
        with pytest.raises(InputError, match=f"^{stage}: asks for 1 x .* 1 nowhere, but the cluster has"):
            check_resources(context_of(tmp_path, ray, "pairs", "judge", "reference", **config), list(STAGES))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_what_the_last_stage_cannot_have_is_refused_before_the_first_begins(tmp_path: Path) -> None:
    config = small_config(cluster={"stages": {"sample": {"gpus_per_worker": 64}}})
    started = time.monotonic()
    with pytest.raises(InputError, match=r"^sample: asks for 1 x \d+ CPU \+ 64 GPU, but the cluster has"):
        run_stages(config, tmp_path, list(STAGES), Console(file=io.StringIO()))
    assert time.monotonic() - started < 30
    assert RunDir(tmp_path).manifest("items")
    assert not any(RunDir(tmp_path).manifest(name) for name in ("embeddings", "pairs", "sft"))
