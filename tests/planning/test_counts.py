"""Counts: from what the config states where the data are not here; what nobody said stays unknown."""

from typing import Any

import pytest

from jpo_ray.config import JointPairs, RunConfig
from jpo_ray.config_file import parse_config
from jpo_ray.config_training import TrainConfig
from jpo_ray.pipeline.plan import make_plan
from jpo_ray.planning.batching import shared_items
from jpo_ray.planning.costs import responses_asked, stage_costs, train_comparisons
from jpo_ray.planning.counts import Counts, count_all, total
from jpo_ray.planning.judging import judge_costs, judged_pairs
from jpo_ray.planning.lengths import STATED, UNKNOWN, product, whole
from jpo_ray.planning.machine import Machine, device_memory_gib, stated_speeds
from jpo_ray.planning.rounds import counts_of_a_round
from jpo_ray.planning.shapes import ModelShapes
from jpo_ray.planning.workers import gpus_of

SPEEDS = dict.fromkeys(("sft", "reference", "train", "sample"), 1.0)
PLAN = {"train_instructions": 1000, "test_instructions": 50, "instruction_tokens": 30, "response_tokens": 20}


def config(**sections: Any) -> RunConfig:
    values: dict[str, Any] = {
        "items": {"train": [{"path": "somebody/train"}], "test": [{"path": "somebody/test"}]},
        "model": {"model_name_or_path": "sandbox"},
        "judge": {"annotator": "openai", "prompt_price": 0.5, "completion_price": 1.5},
        "plan": PLAN,
    }
    return parse_config(values | sections, "test")


def counted(config: RunConfig) -> Counts:
    return count_all(config, None, {"validation", "sft"}, None)


def test_what_is_not_known_stays_so() -> None:
    assert product(2, None, 3) is None
    assert product(2, 3) == 6
    assert total([1, None]) is None
    assert total([]) == 0
    assert whole(None) is None
    found = counted(config(plan={}))
    assert found.splits["train"].origin == UNKNOWN
    assert found.splits["validation"].instructions == 0  # the config has none
    assert found.fine_tuning is None
    assert found.tokens.compared is None
    assert [cost.steps for cost in stage_costs(config(plan={}), found, None, SPEEDS)] == [None] * 4


def test_stated_counts_by_hand() -> None:
    """1,000 instructions of two responses: 1,000 pairs of each protocol, and 65 % of them decisive."""
    found = counted(config())
    train = found.splits["train"]
    assert (train.origin, train.items, train.conditional, train.joint) == (STATED, 2000, 1000, 1000)
    assert found.preferences == {"conditional": 650, "joint": 650}
    assert found.fine_tuning == 1000
    assert found.tokens.compared == 50
    assert found.tokens.fine_tuning == 1000 * 50
    assert train_comparisons(TrainConfig(), found) == 1300
    assert train_comparisons(TrainConfig(max_train_comparisons=100), found) == 100


def test_short_items_budgets_and_responses() -> None:
    """With 40 % of the items short enough; three responses make three pairs of an instruction."""
    plan = PLAN | {"short_items": 0.4, "responses_per_instruction": 3}
    pairs = {"max_item_characters": 500, "joint": {"budget": 77}}
    train = counted(config(plan=plan, pairs=pairs)).splits["train"]
    assert (train.items, train.conditional, train.joint, train.short) == (3000, 1200, 77, 1200)
    settings = config(plan=plan, pairs=pairs)
    [reference] = [cost for cost in stage_costs(settings, counted(settings), None, SPEEDS) if cost.name == "reference"]
    assert (reference.items, reference.tokens) == (1200, 1200 * 50)  # longer ones are compared with nothing
    assert counted(config(pairs={"conditional": False, "joint": None})).preferences == {"conditional": 0, "joint": 0}


def test_labels_that_come_with_the_data() -> None:
    plan = PLAN | {"conditional_labels": 600, "joint_labels": 500, "short_items": 0.5}
    evaluate = {"judge": {"annotator": "openai"}}
    given: dict[str, Any] = {"judge": {"annotator": "labels"}, "plan": plan, "evaluate": evaluate}
    labelled = counted(config(**given, pairs={"joint": {"strategy": "labelled"}}))
    assert labelled.preferences == {"conditional": 600, "joint": 500}
    short = counted(config(**given, pairs={"joint": {"strategy": "labelled"}, "max_item_characters": 9}))
    assert short.preferences == {"conditional": 300, "joint": 125}
    assert short.preferences_origin == STATED
    proxy = counted(config(**given, pairs={"joint": {"strategy": "proxy"}}))
    assert proxy.preferences == {"conditional": 600, "joint": proxy.splits["train"].joint}
    assert proxy.preferences_origin == f"{STATED}, joint ones derived from the instructions' own"


def test_labels_that_nobody_counted_are_not_known_and_their_keys_are_named() -> None:
    given: dict[str, Any] = {"judge": {"annotator": "labels"}, "evaluate": {"judge": {"annotator": "openai"}}}
    settings = config(**given, pairs={"joint": {"strategy": "labelled"}})
    found = counted(settings)
    assert found.preferences == {"conditional": None, "joint": None}
    assert found.preferences_origin == UNKNOWN
    assert found.splits["train"].joint is None
    said = [line for line in make_plan(settings).assumed if "say so with" in line]
    keys = "plan.conditional_labels and plan.joint_labels"
    assert said == [f"not known: how many comparisons the labels decide; say so with {keys}"]
    [said_of_one] = [
        line
        for line in make_plan(config(**given, pairs={"joint": {"strategy": "proxy"}})).assumed
        if "say so with" in line
    ]
    assert said_of_one.endswith("say so with plan.conditional_labels")


def test_samples_take_their_prompts_and_responses() -> None:
    """50 instructions x 2 models x 3 temperatures, prompts of 30 tokens and responses of 20, or of the 8 allowed."""
    for allowed, each in ((400, 50), (8, 38)):
        settings = config(sample={"max_new_tokens": allowed})
        [cost] = [cost for cost in stage_costs(settings, counted(settings), None, SPEEDS) if cost.stage == "sample"]
        assert (cost.items, cost.tokens) == (300, 300 * each)


def test_a_selection_and_a_closure() -> None:
    chosen = config(judge={"annotator": "openai", "selection": {"budget": 200}, "closure": {"per_item": 2}})
    found = counted(chosen)
    assert judged_pairs(chosen, found) == (1000, 200)
    assert found.preferences == {"conditional": 650, "joint": 130 + 2000}


def test_requests_and_dollars_by_hand() -> None:
    """2,000 comparisons and 50 instructions x 4 models x 3 temperatures, each asked in both orders; answers of 16."""
    from jpo_ray.feedback.prompts import load_prompts

    settings = config(train=[{"objective": "jpo"}, {"objective": "dpo", "protocols": ["conditional"]}, {"name": "b"}])
    found = counted(settings)
    assert responses_asked(settings, found) == 50 * 4 * 3
    judge, evaluate = judge_costs(settings, found, settings.judge)
    assert (judge.comparisons, judge.requests) == (2000, 4000)
    assert (evaluate.comparisons, evaluate.requests) == (600, 1200)
    prompts = load_prompts("paper")
    conditional = (len(prompts.system) + len(prompts.conditional) + 120 + 160) / 4 + 8
    joint = (len(prompts.system) + len(prompts.joint) + 240 + 160) / 4 + 8
    assert judge.tokens == round(2000 * conditional) + round(2000 * joint) + 4000 * 16
    assert judge.cost == pytest.approx((judge.tokens - 64_000) * 0.5e-6 + 64_000 * 1.5e-6)
    free = judge_costs(config(judge={"annotator": "ratings"}), found, None)
    assert [(cost.requests, cost.cost) for cost in free] == [(0, 0.0)]
    unpriced = config(judge={"annotator": "openai", "requests_per_minute": 100})
    [cost] = judge_costs(unpriced, found, None)
    assert cost.cost is None
    assert cost.hours == pytest.approx(4000 / 100 / 60)


def test_steps_that_are_not_exact_are_said_to_be() -> None:
    """Of batches that need not be full: whole lists, phases of a curriculum, a limit of tokens."""
    dpo = {"objective": "dpo", "protocols": ["conditional"]}
    entries = [
        dpo,
        {"objective": "lipo", "protocols": ["conditional"]},
        {"objective": "pro", "protocols": ["conditional"]},
        dpo | {"name": "easy", "curriculum": {"easy": "reference"}},
        dpo | {"name": "tokens", "max_batch_tokens": 4096},
    ]
    said = [line for line in make_plan(config(train=entries)).assumed if line.startswith("steps")]
    assert [line.partition(" are not exact")[0] for line in said] == ["steps of lipo, pro, easy, tokens"]
    assert not any(line.startswith("steps") for line in make_plan(config(train=[dpo])).assumed)


def test_a_tournament_by_hand() -> None:
    """Three models: three couples, on 20 of the 50 instructions at two temperatures, and 30 joint comparisons each."""
    sections = {
        "train": [{"objective": "jpo"}, {"objective": "dpo", "protocols": ["conditional"]}],
        "sample": {"temperatures": [0.5, 1.0]},
        "evaluate": {"tournament": {"instructions": 20, "joint_per_pair": 30}},
    }
    settings = config(**sections)
    tournament = judge_costs(settings, counted(settings), settings.judge)[-1]
    assert (tournament.stage, tournament.comparisons) == ("tournament", 3 * 2 * 20 + 3 * 30)


def test_steps_follow_from_counts() -> None:
    """1,300 comparisons of which 650 are conditional, 32 a step: 41 and 21 steps an epoch; 84 steps of fine-tuning."""
    entries = [
        {"objective": "jpo", "num_train_epochs": 2},
        {"objective": "dpo", "protocols": ["conditional"]},
        {"name": "long", "objective": "dpo", "protocols": ["conditional"], "steps_like": "jpo"},
    ]
    settings = config(train=entries, sft={"num_train_epochs": 1, "items_per_step": 12})
    found = {cost.name: cost for cost in stage_costs(settings, counted(settings), None, SPEEDS)}
    steps = {name: cost.steps for name, cost in found.items()}
    assert steps == {"sft": 84, "reference": None, "train/jpo": 82, "train/dpo": 21, "train/long": 82, "sample": None}
    assert found["train/dpo"].items == 1300
    assert found["train/dpo"].tokens == 650 * 30 + 1300 * 20  # an instruction is computed once for its two responses


def test_items_that_a_step_shares() -> None:
    """Conditional pairs alone share nothing; joint ones within groups a lot; `pairs` next to nothing."""
    graph, pairs = TrainConfig(), TrainConfig(batching="pairs")
    alone = shared_items(graph, 5000, 5000, 0, None)
    assert (alone.items, alone.instructions) == (2.0, 1.0)
    mixed = shared_items(graph, 3000, 3000, 3000, JointPairs())
    assert mixed.items == pytest.approx(1.14, abs=0.05)  # measured on such a graph: docs/benchmarks.md
    assert shared_items(pairs, 3000, 3000, 3000, JointPairs()).items > 1.9
    grouped = shared_items(TrainConfig(comparisons_per_step=128), 3000, 0, 12_000, JointPairs(group_size=32))
    assert grouped.items == pytest.approx(0.25, abs=0.05)  # config.py: a quarter of an item per comparison
    assert shared_items(graph, 10, 0, 0, None).items == 0


# Of 864 weights a token meets 64 in the layer and 800 in the head; embeddings are looked up. LoRA of rank 2 adds 32.
TOY = ModelShapes(
    {"model.embed_tokens.weight": (100, 8), "layers.0.self_attn.q_proj.weight": (8, 8), "lm_head.weight": (100, 8)},
    {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    "made up",
)
WHOLE_MODEL = {"objective": "dpo", "protocols": ["conditional"], "batching": "pairs", "use_peft": False}
ADAPTER = WHOLE_MODEL | {"use_peft": True, "lora_r": 2}


def seconds(stage: str, **sections: Any) -> float | None:
    """At 10 flops a second in SFT, 100 in the reference pass, 1,000 in training, 10,000 in sampling."""
    speeds = {"sft": 10.0, "reference": 100.0, "train": 1e3, "sample": 1e4}
    settings = config(**sections)
    (found,) = [cost.seconds for cost in stage_costs(settings, counted(settings), TOY, speeds) if cost.stage == stage]
    return found


def test_time_of_fine_tuning_by_hand() -> None:
    """1,000 items of 50 tokens, twice. A weight takes 2 flops forward, 2 for its gradient, 2 to pass one on.

    Checkpointing computes forward again: 8 in place of 6.
    """
    tokens = 2 * 1000 * 50
    assert seconds("sft", sft={"num_train_epochs": 2}) == tokens * 6 * 864 / 10
    assert seconds("sft", sft={"num_train_epochs": 2, "gradient_checkpointing": True}) == tokens * 8 * 864 / 10


def test_time_of_training_by_hand() -> None:
    """650 comparisons of two responses to one instruction: 650 * 30 + 1,300 * 20 tokens an epoch, which is one.

    A frozen weight has no gradient of its own: 4 flops, and 6 with checkpointing; an adapter's weight 6, and 8.
    """
    tokens = 650 * 30 + 1300 * 20
    assert seconds("train", train=[WHOLE_MODEL]) == tokens * 6 * 864 / 1e3
    assert seconds("train", train=[WHOLE_MODEL | {"gradient_checkpointing": True}]) == tokens * 8 * 864 / 1e3
    assert seconds("train", train=[ADAPTER]) == tokens * (4 * 864 + 6 * 32) / 1e3
    assert seconds("train", train=[ADAPTER | {"gradient_checkpointing": True}]) == tokens * (6 * 864 + 8 * 32) / 1e3
    assert seconds("train", train=[ADAPTER | {"num_train_epochs": 3}]) == 3 * tokens * (4 * 864 + 6 * 32) / 1e3


def test_time_of_kto_by_hand() -> None:
    """Beside what DPO takes, each item's instruction with another response goes forward alone, 2 flops a weight.

    The two responses of an instruction share it there as in training. The reference scores twice as many items.
    """
    tokens = 650 * 30 + 1300 * 20
    kto = {"objective": "kto"}
    assert seconds("train", train=[WHOLE_MODEL | kto]) == tokens * (6 + 2) * 864 / 1e3
    assert seconds("train", train=[ADAPTER | kto]) == tokens * (4 * 864 + 6 * 32 + 2 * 864 + 2 * 32) / 1e3
    again = ADAPTER | kto | {"gradient_checkpointing": True}  # what has no gradient is not computed again
    assert seconds("train", train=[again]) == tokens * (6 * 864 + 8 * 32 + 2 * 864 + 2 * 32) / 1e3
    assert seconds("reference", train=[ADAPTER]) == 1300 * 50 * 2 * 864 / 100
    assert seconds("reference", train=[ADAPTER | kto]) == 2 * 1300 * 50 * 2 * 864 / 100


def test_items_that_the_reference_scores_by_hand() -> None:
    """Of 1,000 instructions with two responses 650 conditional comparisons are decisive: each has items of its own.

    Joint ones share items with each other and with those. Twins are of what KTO trains on, and test items of nothing.
    """

    def scored(*train: dict[str, Any], **sections: Any) -> int | None:
        settings = config(train=list(train), **sections)
        [cost] = [cost for cost in stage_costs(settings, counted(settings), None, SPEEDS) if cost.name == "reference"]
        return cost.items

    dpo = {"objective": "dpo", "protocols": ["conditional"]}
    few = {"max_train_comparisons": 100}
    assert scored(dpo) == scored(dpo, {"name": "again"} | dpo) == 1300
    assert scored(dpo | few) == scored(dpo | few, {"name": "again"} | dpo | few) == 200
    assert scored(dpo | few, {"name": "kto"} | dpo | few | {"objective": "kto"}) == 400
    both, joint = scored({"name": "a"}), scored({"protocols": ["joint"]})
    assert both is not None
    assert joint is not None
    assert 650 < joint <= 1000 < 1300 < both < 1300 + joint
    items = {"train": [{"path": "some/train"}], "validation": [{"path": "some/validation"}]}
    held_out = (scored(dpo | few, items=items, plan=PLAN | {"validation_instructions": 100}) or 0) - 200
    assert 2 * 65 < held_out < 2 * 100  # in 65 conditional comparisons, or in joint ones


def test_time_of_sampling_by_hand() -> None:
    """50 instructions x 2 models x 3 temperatures, 30 tokens of prompt and 20 of response."""
    assert seconds("sample", train=[ADAPTER]) == 300 * 50 * 2 * 864 / 1e4


def test_rounds_by_hand() -> None:
    """Three rounds of 200 instructions with three answers each: 600 items and conditional pairs, 200 joint ones."""
    settings = config(
        judge={"annotator": "openai"},
        train=[{"objective": "jpo"}],
        rounds={"count": 3, "instructions": 200, "samples_per_instruction": 3},
    )
    counts = counted(settings)
    each = counts_of_a_round(settings, counts)
    train = each.splits["train"]
    assert (train.instructions, train.items, train.conditional, train.joint) == (200, 600, 600, 200)
    assert each.preferences == {"conditional": 390, "joint": 130}
    judge = judge_costs(settings, counts, None, each)[0]
    assert (judge.comparisons, judge.requests) == (2400, 4800)
    found = {cost.name: cost for cost in stage_costs(settings, counts, None, SPEEDS, each)}
    assert list(found) == ["sft", "draw x3", "reference x3", "train/jpo-1", "train/jpo-2", "train/jpo-3", "sample"]
    assert found["draw x3"].items == 1800
    assert found["reference x3"].tokens == 3 * 600 * 50
    assert found["train/jpo-2"].steps == 17
    assert found["sample"].items == 50 * 4 * 3  # the SFT model's and each round's


def test_gpus_and_speeds_of_stages() -> None:
    """Four workers; two sampling engines on two GPUs each; two trainings side by side hold eight."""
    cluster = {"num_workers": 4, "num_actors": 2, "gpus_per_worker": 1, "trainings_at_once": 2}
    settings = config(cluster=cluster, sample={"tensor_parallel_size": 2}, plan={"peak_tflops": 100, "mfu": 0.5})
    assert [gpus_of(settings, stage) for stage in ("sft", "reference", "train", "sample")] == [4, 2, 8, 4]
    machine = Machine(0, "", None, cores=8, memory_gib=64.0, free_disk_gib=100.0, free_hub_gib=100.0, one_disk=True)
    speeds, [said] = stated_speeds(settings, machine)
    assert speeds == {"pairs": 1e14, "sft": 2e14, "reference": 1e14, "train": 2e14, "sample": 2e13}
    assert "100 TFLOPS a GPU" in said
    assert device_memory_gib(settings, machine, "train") == 80.0
    alone = config(cluster={"num_workers": 2})
    speeds, [said] = stated_speeds(alone, machine)
    assert speeds["sft"] == pytest.approx(8 * 0.1e12 * 0.5)  # the cores, however many workers share them
    assert device_memory_gib(alone, machine, "sft") == 32.0
