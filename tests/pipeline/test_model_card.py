"""The card of a model says what its manifests say: no training is run here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jpo_ray.artifacts import Manifest
from jpo_ray.config_training import TrainConfig
from jpo_ray.data.tokens import Layout, prompt_ids
from jpo_ray.files import write_json
from jpo_ray.pipeline.model_card import Exported, model_card
from jpo_ray.runs import RunDir
from jpo_ray.sandbox.model import make_tokenizer

MODEL = {"template": "Q: {instruction}\nA:", "dtype": "float32"}


def stand(run: Path, artifact: str, inputs: dict[str, str], config: dict[str, Any], counts: dict[str, Any]) -> Manifest:
    manifest = Manifest(artifact, f"print of {artifact}", inputs, config, {}, counts, {}, 1.0)
    (run / artifact).mkdir(parents=True, exist_ok=True)
    write_json(run / artifact / "manifest.json", manifest.__dict__)
    return manifest


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run elsewhere than the current folder, of data of the Hub and a file that is gone."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder = tmp_path / "work" / "mine"
    items = {"train": [{"path": "data/train"}, {"path": "somebody/data"}], "sft": []}
    inputs = {"train:data/train": "0123456789", "train:somebody/data": "somebody/data"}
    stand(folder, "items", inputs, {"items": items}, {"train_items": 4, "train_instructions": 2})
    judge = {"annotator": "openai", "model": "gpt-4o"}
    stand(folder, "judge", {}, {"judge": judge}, {"preferences": 3})
    return folder


def trained(run: Path, counts: dict[str, Any], inputs: dict[str, str], **more: Any) -> Manifest:
    keys = more.pop("train", {})
    config = {"train": TrainConfig(**keys).model_dump(exclude={"continue_from"}), "model": MODEL} | more
    return stand(run, f"train/{config['train']['name']}", inputs, config, counts)


def card(run: Path, manifest: Manifest, base: str | None = None) -> tuple[dict[str, Any], str]:
    name = manifest.artifact.removeprefix("train/")
    note = f"its base is {base}; publish that too" if base else None
    exported = Exported(RunDir(run), name, manifest, "adapter" if base else "model", base, note)
    _, front, body = model_card(exported).split("---\n", 2)
    return yaml.safe_load(front), body


def test_fine_tuning_is_told_where_there_was_any(run: Path) -> None:
    """Without a report, and with the fine-tuning's own keys."""
    counts = {"base_model": "somebody/base"}
    front, body = card(run, trained(run, counts, {"sft": "hash of the base"}))
    assert "from `somebody/base` with jpo-ray" in body
    assert ": preference training with the objective `jpo`" in body
    assert "supervised" not in body
    assert "sft: " not in body
    assert front["base_model"] == "somebody/base"
    stand(run, "sft", {}, {"sft": {"learning_rate": 0.25, "items_per_step": 7}, "model": MODEL}, counts)
    _, body = card(run, trained(run, counts, {"sft": "print of sft"}))
    assert ": supervised fine-tuning, then preference training" in body
    assert "| sft: learning_rate | 0.25 |\n| sft: items_per_step | 7 |" in body
    _, body = card(run, trained(run, counts, {"sft": "hash of the base"}))  # beside an older fine-tuning
    assert "supervised" not in body


def test_what_was_read_from_here_is_no_name_on_the_hub(run: Path) -> None:
    front, body = card(run, trained(run, {"base_model": "./runs/sft-lora"}, {}))
    assert front["datasets"] == ["somebody/data"]
    assert "base_model" not in front
    assert "from `sft-lora` with" in body
    assert "- `train`\n- `somebody/data`" in body
    (run.parent / "runs").mkdir()
    for name in ("data/train.jsonl", "a/b/c", "runs/sft-lora", "runs/gone", "/a/b", "~/b"):
        front, _ = card(run, trained(run, {"base_model": name}, {}))
        assert "base_model" not in front, name


def test_every_key_that_shapes_a_training_is_in_the_table(run: Path) -> None:
    keys = {
        "objective": "jpo", "beta": 0.3, "also": [{"objective": "dpop", "beta": 0.7, "weight": 0.5}],
        "protocols": ["conditional"], "weight_decay": 0.01, "batching": "pairs", "max_batch_tokens": 900,
    }  # fmt: skip
    _, body = card(run, trained(run, {}, {}, train=keys))
    for key, value in {
        "objective": "jpo + 0.5 dpop", "beta": "0.3", "dpop: beta": "0.7", "weight_decay": "0.01",
        "batching": "pairs", "max_batch_tokens": "900",
    }.items():  # fmt: skip
        assert f"| {key} | {value} |" in body
    assert "None" not in body.split("## Use")[0]


def test_the_judges_are_told_by_kind_and_model(run: Path) -> None:
    interval = {"win_rate": {"mean": 60.0}, "ci95": [55.0, 65.0], "n": 100}
    stand(run, "evaluate", {}, {"judge": {"annotator": "vllm", "model": "/models/judge-7b", "name": "mine"}}, {})
    write_json(run / "evaluate" / "win_rates.json", {"models": {"jpo": interval}})
    _, body = card(run, trained(run, {}, {}))
    assert "3 preferences, judged by gpt-4o (openai)" in body
    assert "judge: mine (judge-7b, vllm)." in body
    assert "| jpo | 60.0 | 55.0 to 65.0 | 100 |" in body


@pytest.mark.parametrize(("reference", "named"), [("moved", "`jpo-1`"), ("fixed", "the SFT model")])
def test_a_rounds_model_says_which_it_is(run: Path, reference: str, named: str) -> None:
    stand(run, "sft", {}, {"sft": {}}, {})
    below = run / "rounds" / "2"
    stand(below, "items", {}, {}, {"train_items": 40, "train_instructions": 20})
    stand(below, "judge", {}, {"judge": {"annotator": "sandbox"}}, {"preferences": 33})
    round_ = {"round": 2, "rounds": {"reference": reference}, "train": {"name": "jpo-2"}}
    _, body = card(run, trained(run, {}, {"sft": "print of sft"}, **round_))
    assert "It is the model of on-policy round 2: " in body
    assert "the model before it, `jpo-1`, gave" in body
    assert f"The reference is {named}." in body
    assert "40 sampled responses of 20 instructions to train on" in body
    assert "33 preferences, judged by sandbox" in body


def test_the_program_for_vllm_names_all_that_it_uses(run: Path) -> None:
    for base, named in (("somebody/base", "somebody/base"), (str(run / "sft"), "BASE")):
        front, body = card(run, trained(run, {}, {}, train={"lora_r": 20}), base)
        program = body.split("```python\n")[2].split("```")[0]
        compile(program, "README.md", "exec")
        assert f'base = "{named}"' in program
        assert "from vllm.lora.request import LoRARequest" in program
        assert "LLM(base, enable_lora=True, max_lora_rank=32)" in program
        assert str(run) not in body
        assert ("base_model" in front) == (named != "BASE")
    _, body = card(run, trained(run, {}, {}))
    program = body.split("```python\n")[2].split("```")[0]
    compile(program, "README.md", "exec")
    assert "LLM(folder)" in program
    assert "lora" not in program.lower()


TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
INSTRUCTION = "Name 'two' fruits\nand a {colour}."


def spaced() -> Any:
    """Llama's and Mistral's kind: a blank is put before the first piece of a text, and of no other."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({"▁", *TURNS, *MODEL["template"], *INSTRUCTION, *"user<>"})
    pieces = {piece: number for number, piece in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(pieces, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def bare() -> Any:
    """GPT-2's and Qwen's kind, without BOS."""
    from transformers import PreTrainedTokenizerFast

    made = make_tokenizer([INSTRUCTION], 270)
    return PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("template", [MODEL["template"], "chat"])
@pytest.mark.parametrize("turns", [TURNS, "{{ bos_token }}" + TURNS], ids=["no BOS in the template", "BOS in it"])
@pytest.mark.parametrize("make", [spaced, bare, lambda: make_tokenizer([INSTRUCTION], 270)], ids=["▁", "bare", "BOS"])
def test_the_program_makes_the_ids_of_training(run: Path, template: str, turns: str, make: Callable[[], Any]) -> None:
    """Its lines between the model's loading and the answer, with a tokenizer of each kind."""
    tokenizer = make()
    tokenizer.chat_template = turns
    _, body = card(run, trained(run, {}, {}, model=MODEL | {"template": template}))
    program = body.split("```python\n")[1].split("```")[0].replace('"INSTRUCTION"', repr(INSTRUCTION))
    made: dict[str, Any] = {"tokenizer": tokenizer}
    exec("instruction = " + program.split("instruction = ")[1].split("inputs = ")[0], made)
    assert made["ids"] == prompt_ids(tokenizer, Layout(template, "", 256), [INSTRUCTION])[0]
