"""Configs: those that ship parse, overrides reach every key, and every mistake is named with its mend."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jpo_ray.config import RunConfig
from jpo_ray.config_file import apply_override, load_config, parse_config
from jpo_ray.errors import InputError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
MINIMAL = """\
items:
  train: [{path: data.jsonl}]
model: {model_name_or_path: sandbox}
train:
  - {name: first, beta: 0.2}
  - {objective: dpo, protocols: [conditional]}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def with_key(key: str, value: Any) -> dict[str, Any]:
    """The minimal config's values with one more key, given as a path of names."""
    values = yaml.safe_load(MINIMAL)
    node: Any = values
    *parents, last = key.split(".")
    for part in parents:
        node = node[int(part)] if part.isdigit() else node.setdefault(part, {})
    node[last] = value
    return dict(values)


def error_of(values: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        parse_config(values, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ")
    assert "\n" not in message
    return message.removeprefix("my.yaml: ")


@pytest.mark.parametrize("path", CONFIGS, ids=[path.name for path in CONFIGS])
def test_every_shipped_config_parses(path: Path) -> None:
    assert load_config(path).train[0].beta > 0


def test_configs_are_found() -> None:
    assert {"sandbox.yaml", "reference.yaml"} <= {path.name for path in CONFIGS}


def test_defaults_are_the_papers(minimal: Path) -> None:
    """Table 7: beta 0.1, batch 32, learning rate 5e-5, cosine, 100 warm-up steps, LoRA r 8, alpha 16, dropout 0.05."""
    dpo = load_config(minimal).train_entry("dpo")
    assert (dpo.beta, dpo.comparisons_per_step, dpo.learning_rate, dpo.warmup_steps) == (0.1, 32, 5e-5, 100)
    assert (dpo.lr_scheduler_type, dpo.lora_r, dpo.lora_alpha, dpo.lora_dropout) == ("cosine", 8, 16, 0.05)


def test_an_entrys_name_is_its_objective_by_default(minimal: Path) -> None:
    assert [entry.name for entry in load_config(minimal).train] == ["first", "dpo"]


def test_a_config_cannot_be_changed(minimal: Path) -> None:
    config = load_config(minimal)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=7", lambda c: c.seed, 7),
        ("train.0.beta=0.5", lambda c: c.train[0].beta, 0.5),
        ("train.first.beta=1e-2", lambda c: c.train[0].beta, 0.01),
        ("train.dpo.lora_r=4", lambda c: c.train[1].lora_r, 4),
        ("train.*.seed=3", lambda c: [entry.seed for entry in c.train], [3, 3]),
        ("train.*.lora_target_modules=[q_proj]", lambda c: c.train[1].lora_target_modules, ["q_proj"]),
        ("items.train.0.path=other.jsonl", lambda c: c.items.train[0].path, "other.jsonl"),
        ("pairs.joint.budget=9", lambda c: c.pairs.joint.budget, 9),
        ("pairs.joint=null", lambda c: c.pairs.joint, None),
        ("evaluate=null", lambda c: c.evaluate, None),
        ("sft=", lambda c: c.sft, None),
        ("evaluate.judge.annotator=sandbox", lambda c: c.evaluate.judge.annotator, "sandbox"),
        ("sample.temperatures=[0, 1.5]", lambda c: c.sample.temperatures, [0, 1.5]),
        ("model.template=Q: {instruction} A=", lambda c: c.model.template, "Q: {instruction} A="),
        ("train=[{name: only}]", lambda c: [entry.name for entry in c.train], ["only"]),
    ],
)
def test_overrides(override: str, read: Any, value: Any, minimal: Path) -> None:
    """By section and key, entries by number, name or all, sections that the file does not have, a whole section."""
    if override.startswith("model.template"):
        override = "model.template='Q: {instruction} A='"
    assert read(load_config(minimal, [override])) == value


def test_later_overrides_win_and_null_sections_come_back(minimal: Path) -> None:
    config = load_config(minimal, ["seed=1", "seed=2", "sft=null", "sft.learning_rate=0.001"])
    assert config.seed == 2
    assert config.sft is not None
    assert config.sft.learning_rate == 0.001


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "`seed`: an override is written section.key=value"),
        ("=3", "`=3`: an override is written section.key=value"),
        ("seed=[1", "`seed=[1`: the value is not valid YAML"),
        ("seed=2001-99-99", "`seed=2001-99-99`: the value is not valid YAML"),
        ("seed=" + "[" * 5000, "`seed=[[[["),
        ("train.third.beta=1", "`train.third.beta`: no entry `third` there (entries are named or numbered from 0)"),
        ("train.2.beta=1", "`train.2.beta`: no entry `2` there (entries are named or numbered from 0)"),
        ("train.*=3", "`train.*`: no entry `*` there (entries are named or numbered from 0)"),
        ("train.*.beta.x.y=1", "`train.0.beta.x.y`: `x` cannot be set there"),
        ("train.first=3", "`train.first=3`: name a key of the entry, as train.first.beta=0.2"),
        ("train.second=3", "`train.second`: no entry `second` there (entries are named or numbered from 0)"),
        ("model.model_name_or_path.x=1", "`model.model_name_or_path.x=1`: model.model_name_or_path is a value, it has"),
        ("train.first.beta.x.y=1", "`train.first.beta.x.y`: `x` cannot be set there"),
    ],
)
def test_bad_overrides(override: str, message: str, minimal: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_config(minimal, [override])
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("sead", "unknown key `sead`; did you mean `seed`?"),
        ("train.0.beata", "unknown key `train.0.beata`; did you mean `beta`?"),
        ("train.1.learning_rates", "unknown key `train.1.learning_rates`; did you mean `learning_rate`?"),
        ("pairs.joint.strategie", "unknown key `pairs.joint.strategie`; did you mean `strategy`?"),
        ("evaluate.judge.noize", "unknown key `evaluate.judge.noize`; did you mean `noise`?"),
        ("items.train.0.pth", "unknown key `items.train.0.pth`; did you mean `path`?"),
        ("report.xyzzy", "unknown key `report.xyzzy`; known here: sample_rows"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, message: str) -> None:
    assert error_of(with_key(key, 1)) == message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "many", "`seed`: Input should be a valid integer, unable to parse string as an integer, got 'many'"),
        ("seed", True, "`config`: seed takes no true or false, got true"),
        ("train.0.lora_r", False, "`train.0`: lora_r takes no true or false, got false"),
        ("model.load_in_4bit", 1, "`model`: load_in_4bit takes true or false, got 1"),
        ("sample.temperatures", [0.5, True], "`sample`: temperatures takes no true or false, got true"),
        ("seed", -1, "`seed`: Input should be greater than or equal to 0, got -1"),
        ("train.0.beta", 0, "`train.0.beta`: Input should be greater than 0, got 0"),
        ("train.0.learning_rate", float("inf"), "`train.0.learning_rate`: Input should be a finite number, got inf"),
        ("train.0.learning_rate", float("nan"), "`train.0.learning_rate`: Input should be"),
        ("train.0.lora_dropout", 1.5, "`train.0.lora_dropout`: Input should be less than 1, got 1.5"),
        ("train.0.objective", "ppo", "`train.0.objective`: Input should be 'jpo', 'dpo', 'cdpo', 'robust', "),
        ("train.0.protocols", [], "`train.0.protocols`: List should have at least 1 item"),
        ("train.0.name", "a/b", "`train.0.name`: String should match pattern"),
        ("train.0.comparisons_per_step", 0, "`train.0.comparisons_per_step`: Input should be greater than or equal to"),
        ("model.dtype", "float16", "`model.dtype`: Input should be 'float32' or 'bfloat16', got 'float16'"),
        ("model.template", "no place", "`model`: template must be `chat` or hold {instruction} exactly once"),
        ("model.template", "{instruction} {instruction}", "`model`: template must be `chat` or hold {instruction} exa"),
        ("pairs.joint", {"min_similarity": 0.9, "max_similarity": 0.1}, "`pairs.joint`: min_similarity must be below"),
        ("sample.temperatures", [-1], "`sample.temperatures.0`: Input should be greater than or equal to 0, got -1"),
        ("items", 3, "`items`: Input should be"),
        ("train", [], "`train`: List should have at least 1 item"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_do(key: str, value: Any, message: str) -> None:
    assert error_of(with_key(key, value)).startswith(message)


def test_required_keys_are_named() -> None:
    values = yaml.safe_load(MINIMAL)
    del values["model"]["model_name_or_path"]
    assert error_of(values) == "`model.model_name_or_path` is required"
    del values["items"]
    assert error_of(values) == "`items` is required (and 1 more)"


def test_dpo_refuses_joint_comparisons() -> None:
    message = error_of(with_key("train.1.protocols", ["conditional", "joint"]))
    assert message == (
        "`train.1`: dpo compares responses of one instruction; set protocols: [conditional], or objective: jpo for "
        "joint ones"
    )
    assert "dpo compares" in error_of(with_key("train", [{"objective": "dpo"}]))


def test_names_must_be_distinct_and_not_sfts() -> None:
    twice = error_of(with_key("train", [{"name": "a"}, {"name": "a", "beta": 1}]))
    assert twice == "`config`: train: entries need distinct names, got a, a"
    assert "entries need distinct names, got jpo, jpo" in error_of(with_key("train", [{}, {"beta": 1}]))
    assert error_of(with_key("train.0.name", "sft")) == "`train.0`: the name `sft` is the SFT model's; choose another"


@pytest.mark.parametrize(
    "steps_like", [["b", None, "none"], ["b", "a", None], ["a", None, None]], ids=["absent", "circle", "itself"]
)
def test_steps_like_needs_an_entry_with_epochs_of_its_own(steps_like: list[str | None]) -> None:
    entries = [{"name": name, "steps_like": like} for name, like in zip("abc", steps_like, strict=True)]
    assert ".steps_like: no entry `" in error_of(with_key("train", entries))


def test_steps_like_another_entry() -> None:
    values = with_key("train", [{"name": "a", "steps_like": "b"}, {"name": "b"}])
    assert parse_config(values, "my.yaml").train_entry("a").steps_like == "b"


def test_models_to_sample_must_exist() -> None:
    assert parse_config(with_key("sample.models", ["sft", "dpo"]), "my.yaml").sample is not None
    message = error_of(with_key("sample.models", ["sft", "second"]))
    assert message == "`config`: sample.models: no model `second`; there are sft, first, dpo"


def test_files_that_are_no_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(InputError, match=r"^--config .*config\.yaml: no such file$"):
        load_config(path)
    with pytest.raises(InputError, match=r"^--config .*: cannot be read"):
        load_config(tmp_path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"^--config .*: cannot be read"):
        load_config(path)
    path.write_text("items:\n  train: [\nmodel: }\n")
    with pytest.raises(InputError, match=r"config\.yaml line 3: not valid YAML"):
        load_config(path)
    path.write_text("a: !!python/object:os.system {}\n")
    with pytest.raises(InputError, match=r"config\.yaml line 1: not valid YAML"):
        load_config(path)
    for text in ("", "- a\n", "words\n"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"config\.yaml: must be a mapping of sections \(seed, report_to, items, "):
            load_config(path)


NAMES = st.sampled_from([*RunConfig.model_fields, "path", "beta", "name", "joint", "judge", "0", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.integers(0, 3), inner, max_size=3),
    max_leaves=8,
)


@given(section=NAMES, value=VALUES)
@settings(max_examples=80, deadline=None, database=None)
def test_whatever_stands_there_is_a_config_or_an_input_error(section: str, value: Any) -> None:
    """Never another exception, which would be a traceback for the user."""
    with suppress(InputError):
        assert parse_config(yaml.safe_load(MINIMAL) | {section: value}, "my.yaml").train


@given(key=st.lists(NAMES | st.sampled_from(["first", "dpo", "1", "9"]), max_size=4), value=st.text(max_size=6))
@settings(max_examples=80, deadline=None, database=None)
def test_whatever_is_overridden_is_a_config_or_an_input_error(key: list[str], value: str) -> None:
    values = yaml.safe_load(MINIMAL)
    with suppress(InputError):
        apply_override(values, ".".join(key) + "=" + value)
        assert parse_config(values, "my.yaml").train


def test_four_bit_weights_are_not_trained_in_full() -> None:
    values = with_key("model.load_in_4bit", True) | {"train": [{"use_peft": False}]}
    assert "train.jpo: 4-bit weights cannot be trained; set use_peft: true or load_in_4bit: false" in error_of(values)


@pytest.mark.parametrize(("key", "value"), [("models", ["sft", "sft"]), ("temperatures", [0.5, 0.5])])
def test_the_same_sample_twice_is_refused(key: str, value: list[Any]) -> None:
    assert f"sample.{key}: has the same value twice" in error_of(with_key(f"sample.{key}", value))


def test_the_default_train_entry_can_be_overridden(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("items: {train: [{path: data.jsonl}]}\nmodel: {model_name_or_path: sandbox}\n")
    assert load_config(path, ["train.jpo.beta=0.7"]).train_entry("jpo").beta == 0.7
    assert load_config(path, ["train.*.beta=0.7"]).train_entry("jpo").beta == 0.7
