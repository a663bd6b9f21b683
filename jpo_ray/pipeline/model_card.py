"""The model card (README.md) of an exported model: what it is, what it was made from, how good it is, how to use it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpo_ray import __version__
from jpo_ray.artifacts import Manifest
from jpo_ray.config import TrainConfig
from jpo_ray.data.tokens import CHAT
from jpo_ray.files import read_json
from jpo_ray.runs import RunDir

ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
SHOWN = (  # of a training's keys, besides those of its objective
    "learning_rate", "num_train_epochs", "lr_scheduler_type", "warmup_steps", "optim", "comparisons_per_step",
    "items_per_step", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "seed",
)  # fmt: skip
WITHOUT_LORA = {"lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"}


@dataclass(frozen=True)
class Exported:
    """What is exported: the model `name` of a run, as a whole `model` or as an `adapter` on `base`."""

    run: RunDir
    name: str
    manifest: Manifest
    kind: str
    base: str | None
    note: str | None


def model_card(exported: Exported) -> str:
    """Markdown with YAML front matter."""
    from huggingface_hub import ModelCardData

    run, config = exported.run, _config_of(exported.run)
    trained = exported.manifest.config.get("train")
    base = exported.base or (config.get("model") or {}).get("model_name_or_path")
    datasets = [path for path in _sources(config) if _is_on_hub(path)]
    tags = ["jpo-ray", *(["joint-preference-optimization", trained["objective"]] if trained else ["sft"])]
    front = ModelCardData(
        base_model=base if base and _is_on_hub(base) else None,
        datasets=datasets or None,
        library_name="peft" if exported.kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*tags, *(["lora"] if exported.kind == "adapter" else [])])),
    )
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {exported.name}",
        _summary(exported, trained, base),
        "## Data\n\n" + "\n".join(f"- {line}" for line in _data(run, config)),
        "## Training\n\n" + _table(["key", "value"], _hyperparameters(exported.manifest.config)),
        "## Results\n\n" + _results(run, exported.name),
        "## Use\n\n" + _use(exported),
    ]
    return "\n\n".join(parts) + "\n"


def _config_of(run: RunDir) -> dict[str, Any]:
    """The run's whole config where a report stands, else what its manifests say of it."""
    report = run.manifest("report")
    if report is not None:
        found: dict[str, Any] = report.config["config"]
        return found
    items, judge = run.manifest("items"), run.manifest("judge")
    return (items.config if items else {}) | (judge.config if judge else {})


def _sources(config: dict[str, Any]) -> list[str]:
    items = config.get("items") or {}
    return list(dict.fromkeys(source["path"] for split in ("train", "sft") for source in items.get(split) or []))


def _is_on_hub(name: str) -> bool:
    return bool(ON_HUB.fullmatch(name)) and not Path(name).exists()


def _named(path: str) -> str:
    """A file by its name alone: where it lay is nobody's concern."""
    return path if _is_on_hub(path) else Path(path).name


def _summary(exported: Exported, trained: dict[str, Any] | None, base: str | None) -> str:
    of = f"`{_named(base)}`" if base else "a base model"
    lines = [f"{'An adapter' if exported.kind == 'adapter' else 'A model'} made from {of} with jpo-ray {__version__}"]
    if trained is None:
        lines[0] += ": supervised fine-tuning, the reference of preference training."
    else:
        losses = TrainConfig(**trained).losses
        protocols = " and ".join(trained["protocols"])
        lines[0] += (
            f": supervised fine-tuning, then preference training with the objective `{losses}` on {protocols} "
            "comparisons."
        )
    if trained and "joint" in trained["protocols"]:
        lines.append(
            "Joint comparisons set one instruction-response pair against another whose instruction may differ "
            "([Joint Preference Optimization](https://arxiv.org/abs/2404.00530))."
        )
    if exported.note:
        lines.append(exported.note[0].upper() + exported.note[1:].rstrip(".") + ".")
    return "\n".join(lines)


def _data(run: RunDir, config: dict[str, Any]) -> Iterator[str]:
    for path in _sources(config):
        yield f"`{_named(path)}`"
    items, judge = run.manifest("items"), run.manifest("judge")
    if items:
        counts = items.counts
        yield f"{counts['train_items']:,} items of {counts['train_instructions']:,} instructions to train on"
    if judge:
        section = judge.config.get("judge") or {}
        by = section.get("name") or (
            section.get("model") if section.get("annotator") in ("openai", "vllm", "reward_model") else None
        )
        who = by or section.get("annotator", "the labels of the data")
        yield f"{judge.counts.get('preferences', 0):,} preferences, judged by {_named(str(who))}"


def _hyperparameters(config: dict[str, Any]) -> list[list[str]]:
    trained = config.get("train") or config.get("sft") or {}
    rows = []
    if "objective" in trained:
        entry = TrainConfig(**trained)
        rows = [["objective", entry.losses], *([key, f"{value:g}"] for key, value in entry.parameters().items())]
    left_out = set() if trained.get("use_peft", False) else WITHOUT_LORA
    rows += [[key, _value(trained[key])] for key in SHOWN if key in trained and key not in left_out]
    model = config.get("model") or {}
    return rows + [[key, _value(model[key])] for key in ("dtype", "load_in_4bit", "max_length") if key in model]


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _results(run: RunDir, name: str) -> str:
    path = run.path("evaluate") / "win_rates.json"
    evaluated = run.manifest("evaluate")
    if evaluated is None or not path.exists():
        return "Not evaluated."
    models = read_json(path)["models"]
    rows = [
        [
            label,
            _percent(found["win_rate"]["mean"]),
            " to ".join(map(_percent, found["ci95"])),
            f"{found['n']:,}",
        ]
        for label, found in models.items()
        if label in (name, "sft")
    ]
    if not rows:
        return "Not evaluated."
    judge = (evaluated.config.get("judge") or {}).get("annotator", "the run's judge")
    return (
        _table(["model", "win rate, percent", "95 % interval", "comparisons"], rows)
        + f"\n\nSamples against the data's gold responses, in both orders, ties half, over all temperatures; judge: "
        f"{judge}."
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _use(exported: Exported) -> str:
    model = exported.manifest.config["model"]
    if model["template"] == CHAT:
        prompt = (
            'tokenizer.apply_chat_template([{"role": "user", "content": instruction}], tokenize=False, '
            "add_generation_prompt=True)"
        )
        bos = "prompt"
    else:
        prompt = f"{model['template']!r}.replace('{{instruction}}', instruction)"
        bos = "(tokenizer.bos_token or '') + prompt"
    adapter = exported.kind == "adapter"
    loader = "from peft import AutoPeftModelForCausalLM as AutoModelForCausalLM\n" if adapter else ""
    plain = "" if adapter else "AutoModelForCausalLM, "
    engine = "LLM(base, enable_lora=True)" if adapter else "LLM(folder)"
    lora = ", lora_request=LoRARequest('adapter', 1, folder)" if adapter else ""
    return f"""The prompt has the form that the model was trained on.

```python
{loader}from transformers import {plain}AutoTokenizer

folder = "FOLDER"  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

instruction = "INSTRUCTION"
prompt = {prompt}
ids = tokenizer({bos}, return_tensors="pt", add_special_tokens=False)
answer = model.generate(**ids, max_new_tokens=256, do_sample=False)
print(tokenizer.decode(answer[0, ids["input_ids"].shape[1]:], skip_special_tokens=True).strip())
```

With vLLM: `{engine}.generate({{"prompt_token_ids": ids["input_ids"][0].tolist()}}{lora})`{_served(adapter)}.

In the run's folder, `jpo serve --run-dir RUN_DIR` serves it behind an OpenAI-compatible endpoint that lays prompts out
by itself."""


def _served(adapter: bool) -> str:
    return ", or `vllm serve BASE --enable-lora --lora-modules NAME=FOLDER`" if adapter else ", or `vllm serve FOLDER`"
