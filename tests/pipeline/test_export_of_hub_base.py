"""A run that begins with a chat model of the Hub and fine-tunes nothing: trained, sampled and exported under `chat`."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jpo_ray import records
from jpo_ray.cli import main
from jpo_ray.config_serve import ServeConfig
from jpo_ray.data.tokens import Layout, prompt_ids
from jpo_ray.engine.adapters import load_adapter
from jpo_ray.engine.model import load_tokenizer
from jpo_ray.files import read_json, write_json
from jpo_ray.sandbox import BASE_MODEL
from jpo_ray.serving.models import find_models
from pipeline.inline import JPO, install, run, small_config

NAME = "somebody/chatty"
TURNS = (  # without BOS, as ChatML
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDS = [2, 0]  # of an answer, as chat models have several: EOS and padding
MOST = 256  # tokens of an answer, as many as the card's program asks for
CHAT = Layout("chat", "", 256)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The Hub's cache with the sandbox's model and a chat template in it, and no network."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / f"models--{NAME.replace('/', '--')}"
    base = shutil.copytree(BASE_MODEL, repository / "snapshots" / "abc")
    write_json(base / "generation_config.json", {"eos_token_id": ENDS})
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(base)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield repository


@pytest.fixture(scope="module")
def of_hub(hub: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:  # noqa: ARG001
    folder = tmp_path_factory.mktemp("of-hub")
    model = {"model_name_or_path": NAME, "template": "chat", "max_length": CHAT.max_length}
    sample = {"engine": "transformers", "temperatures": [0.0], "max_new_tokens": MOST, "max_instructions": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JPO_CACHE", str(folder / "cache"))
        install(patch)
        run(small_config(model=model, sft=None, train=[JPO], sample=sample, evaluate=None), folder / "run")
    return folder / "run"


def export(run_dir: Path, out: Path, *flags: str) -> dict[str, Any]:
    """The front matter of the card."""
    assert main(["export", "--run-dir", str(run_dir), "--model", "jpo", "--out", str(out), *flags]) == 0
    front: dict[str, Any] = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    return front


def program_of(out: Path, instruction: str) -> str:
    program = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    return program.replace("FOLDER", str(out)).replace('"INSTRUCTION"', repr(instruction))


@pytest.mark.parametrize("flags", [(), ("--adapter",)], ids=["merged", "adapter"])
def test_the_cards_program_answers_as_the_engine_under_chat(
    of_hub: Path, hub: Path, flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Greedy, to each sampled instruction; what the adapter says to the ids of training is what was sampled."""
    export(of_hub, tmp_path / "out", *flags)
    base = hub / "snapshots" / "abc"
    tokenizer = load_tokenizer(base)
    adapter = load_adapter(of_hub / "train" / "jpo", base, dtype="float32")
    rows = records.read_table(of_hub / "sample" / "samples.parquet", records.SAMPLES).to_pylist()
    sampled = {row["instruction"]: row["response"] for row in rows if row["model"] == "jpo"}
    assert len(sampled) == 3
    capsys.readouterr()
    for instruction, response in sampled.items():
        (ids,) = prompt_ids(tokenizer, CHAT, [instruction])
        inputs = torch.tensor([ids])
        answer = adapter.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=MOST, do_sample=False)
        expected = tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True).strip()
        assert expected == response != ""
        exec(compile(program_of(tmp_path / "out", instruction), "README.md", "exec"), {})
        assert capsys.readouterr().out == f"{expected}\n"


def test_an_adapter_names_the_base_as_the_hub_does(of_hub: Path, hub: Path, tmp_path: Path) -> None:
    """And no folder of this machine; another name is still to be had."""
    out = tmp_path / "out"
    assert export(of_hub, out, "--adapter")["base_model"] == NAME
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == NAME
    assert read_json(out / "base_model.json")["model"] == NAME
    for file in ("adapter_config.json", "base_model.json", "README.md"):
        text = (out / file).read_text()
        assert str(hub.parent) not in text
        assert str(of_hub) not in text
    assert f'base = "{NAME}"' in (out / "README.md").read_text()
    assert "publish that too" not in (out / "README.md").read_text()
    front = export(of_hub, tmp_path / "named", "--adapter", "--base", "somebody/copied")
    assert front["base_model"] == "somebody/copied"


def test_on_another_machine_the_base_is_had_from_the_hub(
    of_hub: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the folder that training loaded it from is not; one of other weights is refused."""
    export(of_hub, tmp_path / "here")
    there = Path(shutil.copytree(of_hub, tmp_path / "there"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    moved = hub.rename(tmp_path / "cache" / hub.name)
    try:
        assert export(there, tmp_path / "out")["base_model"] == NAME
        assert export(there, tmp_path / "adapter", "--adapter")["base_model"] == NAME
        assert find_models(ServeConfig(run_dir=str(there))).base == (moved / "snapshots" / "abc").resolve()
        assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == ENDS
        written, expected = (tmp_path / name / "model.safetensors" for name in ("out", "here"))
        assert written.read_bytes() == expected.read_bytes()
        shutil.copy(tmp_path / "here" / "model.safetensors", moved / "snapshots" / "abc")
        capsys.readouterr()
        assert main(["export", "--run-dir", str(there), "--model", "jpo", "--out", str(tmp_path / "other")]) == 2
        assert "was trained on" in capsys.readouterr().err
    finally:
        shutil.copy(Path(BASE_MODEL) / "model.safetensors", moved / "snapshots" / "abc")
        moved.rename(hub)
