"""Models that judge, or policies that are read, on the cluster: their memory by hand, their GPUs, what is unknown."""

from pathlib import Path
from typing import Any

import pytest

from jpo_ray.cluster.rewards import BATCH
from jpo_ray.config import RunConfig
from jpo_ray.config_file import parse_config
from jpo_ray.pipeline.plan import make_plan
from jpo_ray.planning.judging import judging_stage
from jpo_ray.planning.memory import CPU_GIB, GIB, GPU_GIB, REWARDED_AT_ONCE
from jpo_ray.planning.shapes import ModelShapes
from jpo_ray.planning.show import plan_lines
from jpo_ray.planning.workers import gpus_of, has_gpus

REWARD = {"annotator": "reward_model", "model": "Skywork/Skywork-Reward-V2-Qwen3-0.6B"}
VLLM = {"annotator": "vllm", "model": "Qwen/Qwen3-0.6B"}
UNKNOWN = {"annotator": "vllm", "model": "nobody/judge"}
QWEN = 596_049_920  # parameters of both
BILLION = ModelShapes({"weight": (2**15, 2**15)}, {}, "made up")  # one GiB for each byte of a parameter


@pytest.fixture(autouse=True)
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def config(**sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "items": {"train": [{"path": "somebody/train"}]},
        "model": {"model_name_or_path": "sandbox", "dtype": "bfloat16"},
        "judge": {"annotator": "openai"},
    }
    return parse_config(values | sections, "test")


def memory(settings: RunConfig, stage: str) -> float | None:
    [row], unknown = judging_stage(settings, stage, BILLION)
    assert row.name == row.stage == stage
    assert not unknown
    return row.memory_gib


def test_a_judges_own_model_by_hand() -> None:
    """vLLM: 2 bytes a parameter and a GiB of cache. A reward model: 4, and a layer's 4 * 1,024 + 3 * 3,072 elements of
    the tokens of 16 texts.
    """
    assert REWARDED_AT_ONCE == BATCH == 16
    of_vllm = 2 * QWEN / GIB + 1
    assert memory(config(judge=VLLM), "judge") == pytest.approx(of_vllm + CPU_GIB)
    on_gpus = config(judge=VLLM, cluster={"gpus_per_worker": 1})
    assert memory(on_gpus, "judge") == pytest.approx(of_vllm + GPU_GIB)
    of_reward = 4 * (QWEN + 16 * 1024 * (4 * 1024 + 3 * 3072)) / GIB
    evaluated = config(evaluate={"judge": REWARD})
    assert memory(evaluated, "evaluate") == pytest.approx(of_reward + CPU_GIB)
    split = config(judge=VLLM | {"tensor_parallel_size": 2})
    assert memory(split, "judge") == pytest.approx(QWEN / GIB + 1 + CPU_GIB)
    short = config(evaluate={"judge": REWARD | {"max_length": 512}})
    assert memory(short, "evaluate") == pytest.approx(4 * (QWEN + 16 * 512 * (4 * 1024 + 3 * 3072)) / GIB + CPU_GIB)


def test_the_largest_of_several_counts_and_samples_are_judged_as_pairs_by_default() -> None:
    both = config(judge=VLLM | {"also": [REWARD]})
    assert memory(both, "judge") == memory(config(judge=REWARD), "judge")
    assert memory(both, "evaluate") == memory(config(judge=VLLM), "judge")


def test_policies_that_are_read_hold_the_model() -> None:
    """2 GiB, and where whole models were trained their reference beside them."""
    policies: dict[str, Any] = {"evaluate": {"policies": True}}
    assert memory(config(**policies), "evaluate") == pytest.approx(2 + CPU_GIB)
    assert memory(config(**policies, train=[{"use_peft": False}]), "evaluate") == pytest.approx(4 + CPU_GIB)
    selection = {"budget": 9, "strategy": "margin", "policy": "some/adapter"}
    chosen = config(judge={"annotator": "openai", "selection": selection})
    assert memory(chosen, "judge") == pytest.approx(2 + CPU_GIB)


def test_judges_elsewhere_hold_nothing() -> None:
    for judge in ({"annotator": "openai"}, {"annotator": "sandbox"}):
        for stage in ("judge", "evaluate"):
            assert judging_stage(config(judge=judge), stage, BILLION) == ([], [])
    assert judging_stage(config(judge=VLLM, evaluate=None), "evaluate", BILLION) == ([], [])


def test_gpus_of_judges_are_asked_for() -> None:
    """Five engines judge on a GPU each, two reward models score samples on half a one; an endpoint takes none."""
    stages = {"judge": {"num_actors": 5}, "evaluate": {"num_actors": 2, "gpus_per_worker": 0.5}}
    cluster = {"gpus_per_worker": 1, "stages": stages}
    settings = config(judge=VLLM, evaluate={"judge": REWARD}, cluster=cluster)
    assert (gpus_of(settings, "judge"), gpus_of(settings, "evaluate")) == (5, 1)
    assert "GPUs: the config asks for 5, this machine has" in " ".join(make_plan(settings).missing)
    split = config(judge=VLLM | {"tensor_parallel_size": 2, "also": [REWARD]}, cluster=cluster)
    assert (gpus_of(split, "judge"), gpus_of(split, "evaluate")) == (10, 4)
    elsewhere = config(cluster=cluster)
    assert (gpus_of(elsewhere, "judge"), gpus_of(elsewhere, "evaluate")) == (0, 0)
    alone = config(judge=VLLM, cluster={"stages": {"judge": {"gpus_per_worker": 1}}})
    assert has_gpus(alone, "judge")
    assert not make_plan(alone).on_cpu


def test_a_judge_without_room_is_missing_memory() -> None:
    settings = config(judge=VLLM, plan={"device_memory_gib": 2})
    (said,) = [line for line in make_plan(settings).missing if line.startswith("memory")]
    assert said.startswith("memory: judge, evaluate need up to 3 GiB a worker, there are 2;")


def test_a_judge_of_unknown_size_is_said_to_be_left_out() -> None:
    settings = config(judge=UNKNOWN | {"also": [VLLM]})
    [row], unknown = judging_stage(settings, "judge", BILLION)
    assert unknown == ["nobody/judge"]
    assert row.memory_gib == memory(config(judge=VLLM), "judge")
    said = [line for line in make_plan(settings).assumed if "judges'" in line]
    assert said == ["judges' memory and disk: nobody/judge left out, of a size that is not known here"]


def test_judges_stand_in_the_table_without_time() -> None:
    """The other stages' time is known all the same."""
    plan_of = {"train_instructions": 10, "test_instructions": 10, "instruction_tokens": 9, "response_tokens": 9}
    sources = {"train": [{"path": "somebody/train"}], "test": [{"path": "somebody/test"}]}
    plan = make_plan(config(items=sources, judge=VLLM, evaluate={"judge": REWARD}, plan=plan_of))
    assert [cost.name for cost in plan.stages] == ["judge", "sft", "reference", "train/jpo", "sample", "evaluate"]
    shown = list(plan_lines(plan, "a config"))
    (row,) = [line.split() for line in shown if line.startswith("judge ") and "-" in line.split()]
    assert row == ["judge", "-", "-", "-", "-", "2.8", "-"]
    (together,) = [line for line in shown if line.startswith("together")]
    assert "?" not in together
