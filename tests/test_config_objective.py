"""Objectives in the config: which keys and comparisons each takes, and what they need."""

from typing import Any, get_args

import pytest
from test_config import error_of, with_key

from jpo_ray.config_file import parse_config
from jpo_ray.config_objective import OBJECTIVES, ObjectiveName


@pytest.mark.parametrize("name", ["lipo", "pro"])
def test_listwise_objectives_refuse_joint_comparisons(name: str) -> None:
    """And say why: labels are shares of wins, and LiPO's scores are rewards up to a constant of the instruction."""
    message = error_of(with_key("train", [{"objective": name}]))
    assert message.startswith(f"`train.0`: {name} ranks items by shares of wins, which order only items that met the ")
    assert ("partition function that cancels only within one" in message) == (name == "lipo")
    assert message.endswith("; set protocols: [conditional]")
    alone = {"objective": name, "protocols": ["conditional"]}
    assert parse_config(with_key("train", [alone]), "my.yaml").train_entry(name).joins == "lists"
    for other, named in (({"batching": "pairs"}, "batching: pairs"), ({"curriculum": {}}, "a curriculum")):
        message = error_of(with_key("train", [alone | other]))
        assert message == f"`train.0`: {name} takes all comparisons of an instruction together, {named} would part them"


@pytest.mark.parametrize("name", sorted({*OBJECTIVES} - {"dpo", "lipo", "pro", "sft"}))
def test_the_other_objectives_take_joint_comparisons(name: str) -> None:
    by_scores = {"judge": {"annotator": "sandbox"}}
    entry = parse_config(with_key("train", [{"objective": name}]) | by_scores, "my.yaml").train[0]
    assert (entry.name, entry.protocols) == (name, ["conditional", "joint"])


def test_instructions_are_read_for_joint_comparisons_alone() -> None:
    both, one = ({"objective": "ipo", "protocols": kinds} for kinds in (["conditional", "joint"], ["conditional"]))
    found = [parse_config(with_key("train", [each]), "my.yaml").train[0].reads for each in (both, one)]
    assert found == [{"reference", "instruction"}, {"reference"}]


CONDITIONAL_ODPO = {"objective": "odpo", "protocols": ["conditional"]}
NOT_BY_LABELS = (
    ", which labels do not say; set judge.annotator to ratings or reward_model, or to openai or vllm with judge.soft: "
    "true"
)


@pytest.mark.parametrize(
    ("entry", "judge", "message"),
    [
        (CONDITIONAL_ODPO, {}, f"train.odpo: odpo{{}}{NOT_BY_LABELS}"),
        ({"also": [{"objective": "odpo"}]}, {}, f"train.jpo: odpo{{}}{NOT_BY_LABELS}"),
        ({"curriculum": {}}, {"annotator": "labels"}, f"train.jpo: a curriculum by gap{{}}{NOT_BY_LABELS}"),
        (
            CONDITIONAL_ODPO,
            {"annotator": "openai"},
            "train.odpo: odpo{}, which verdicts alone do not say; set judge.soft: true",
        ),
        (
            {"curriculum": {}},
            {"annotator": "vllm", "model": "somebody/judge"},
            "train.jpo: a curriculum by gap{}, which verdicts alone do not say; set judge.soft: true",
        ),
        (
            {"objective": "odpo"},
            {"annotator": "sandbox", "closure": {}},
            "train.odpo: odpo{}, which comparisons that judge.closure adds do not say; set judge.closure: null or "
            "protocols: [conditional]",
        ),
    ],
)
def test_gaps_without_a_source_are_refused_before_anything_is_judged(
    entry: dict[str, Any], judge: dict[str, Any], message: str
) -> None:
    values = with_key("train", [entry]) | {"judge": judge}
    assert error_of(values) == "`config`: " + message.format(" needs to know by how much each chosen item is better")


@pytest.mark.parametrize(
    ("entry", "judge"),
    [
        ({"curriculum": {"easy": "reference"}}, {"annotator": "labels"}),
        (CONDITIONAL_ODPO, {"annotator": "ratings", "closure": {}}),
        ({"objective": "odpo"}, {"annotator": "openai", "soft": True}),
        ({"curriculum": {}}, {"annotator": "reward_model", "model": "somebody/rewards"}),
    ],
)
def test_gaps_with_a_source(entry: dict[str, Any], judge: dict[str, Any]) -> None:
    assert parse_config(with_key("train", [entry]) | {"judge": judge}, "my.yaml").train


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"label_smoothing": 0.1}, "jpo takes no label_smoothing; label_smoothing is for cdpo, robust"),
        ({"objective": "dpop", "simpo_gamma": 1}, "dpop takes no simpo_gamma; simpo_gamma is for simpo"),
        ({"desirable_weight": 1.0}, "jpo takes no desirable_weight; desirable_weight is for kto"),
        ({"objective": "sft", "name": "a", "beta": 0.2}, "sft takes no beta"),
        (
            {"also": [{"objective": "sft"}, {"objective": "sft", "weight": 2}]},
            "also: each objective once, got jpo, sft,",
        ),
        (
            {"also": [{"objective": "lipo"}]},
            "lipo ranks items by shares of wins, which order only items that met the same others, as an",
        ),
        (
            {"also": [{"objective": "sft", "label_smoothing": 0.1}]},
            "sft takes no label_smoothing; label_smoothing is for",
        ),
        ({"objective": "sft"}, "the name `sft` is the SFT model's; choose another"),
        ({"objective": "robust", "label_smoothing": 0.5}, "Input should be less than 0.5, got 0.5"),
        ({"curriculum": {"phases": 1}}, "Input should be greater than or equal to 2, got 1"),
    ],
)
def test_keys_belong_to_their_objectives(entry: dict[str, Any], message: str) -> None:
    assert message in error_of(with_key("train", [entry]))


def test_an_objectives_own_defaults() -> None:
    """SimPO's beta is of another scale than DPO's; what is given stands, and null is the default."""
    entries = [
        {"objective": "simpo"}, {"objective": "kto", "beta": 0.3, "undesirable_weight": 2}, {"objective": "ipo"},
        {"objective": "cdpo", "beta": None, "label_smoothing": 0},
    ]  # fmt: skip
    found = [entry.parameters() for entry in parse_config(with_key("train", entries), "my.yaml").train]
    assert found == [
        {"beta": 2.0, "simpo_gamma": 1.0},
        {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 2.0},
        {"beta": 0.1},
        {"beta": 0.1, "label_smoothing": 0.0},
    ]


def test_a_config_of_objectives_survives_being_written_and_read() -> None:
    terms = {"objective": "cdpo", "also": [{"objective": "sft", "weight": 0.1}, {"objective": "simpo"}]}
    config = parse_config(with_key("train", [terms]), "my.yaml")
    assert parse_config(config.model_dump(mode="json"), "again") == config
    assert config.train[0].losses == "cdpo + 0.1 sft + simpo"
    assert (config.train[0].reads, config.train[0].joins) == ({"reference", "instruction"}, "edges")


@pytest.mark.parametrize(
    "entry",
    [{"curriculum": {}}, {"max_batch_tokens": 99}, {"objective": "lipo", "protocols": ["conditional"]}],
    ids=["curriculum", "tokens", "lists"],
)
def test_steps_are_not_counted_where_batches_are_uneven(entry: dict[str, Any]) -> None:
    by_scores = {"judge": {"annotator": "sandbox"}}
    for first, second in (({"steps_like": "b"}, entry), (entry | {"steps_like": "b"}, {})):
        message = error_of(with_key("train", [{"name": "a"} | first, {"name": "b"} | second]) | by_scores)
        assert message == (
            "`config`: train.a.steps_like: steps cannot be counted with max_batch_tokens, a curriculum, lipo or pro"
        )


def test_objectives_have_the_names_of_the_table() -> None:
    assert set(get_args(ObjectiveName)) == OBJECTIVES.keys()
