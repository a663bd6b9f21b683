"""The model card (README.md) of an exported model: what it is, what it was made from, how good it is, how to use it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpo_ray import __version__
from jpo_ray.artifacts import Manifest
from jpo_ray.config_training import TrainConfig
from jpo_ray.engine.bases import is_on_hub
from jpo_ray.files import read_json
from jpo_ray.pipeline.card_program import how_to_use
from jpo_ray.runs import RunDir

SHOWN = (  # of a training's keys, besides those of its objective
    "learning_rate", "num_train_epochs", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm",
    "comparisons_per_step", "max_batch_tokens", "batching", "max_train_comparisons", "items_per_step", "lora_r",
    "lora_alpha", "lora_dropout", "lora_target_modules", "seed",
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
    base = exported.base or exported.manifest.counts.get("base_model")
    base = base or (config.get("model") or {}).get("model_name_or_path")
    datasets = [path for path in _sources(config) if is_on_hub(run, path)]
    tags = ["jpo-ray", *(["joint-preference-optimization", trained["objective"]] if trained else ["sft"])]
    front = ModelCardData(
        base_model=base if base and is_on_hub(run, base) else None,
        datasets=datasets or None,
        library_name="peft" if exported.kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*tags, *(["lora"] if exported.kind == "adapter" else [])])),
    )
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {exported.name}",
        _summary(exported, trained, base),
        "## Data\n\n" + "\n".join(f"- {line}" for line in _data(exported, config)),
        "## Training\n\n" + _table(["key", "value"], [*_hyperparameters(exported.manifest.config), *_of_sft(exported)]),
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


def _named(run: RunDir, path: str) -> str:
    """A file by its name alone: where it lay is nobody's concern."""
    return path if is_on_hub(run, path) else Path(path).name


def _summary(exported: Exported, trained: dict[str, Any] | None, base: str | None) -> str:
    run, manifest = exported.run, exported.manifest
    of = f"`{_named(run, base)}`" if base else "a base model"
    lines = [f"{'An adapter' if exported.kind == 'adapter' else 'A model'} made from {of} with jpo-ray {__version__}"]
    if trained is None:
        lines[0] += ": supervised fine-tuning, the reference of preference training."
    else:
        losses = TrainConfig(**trained).losses
        protocols = " and ".join(trained["protocols"])
        sft = run.manifest("sft")
        tuned = sft is not None and manifest.inputs.get("sft") == sft.fingerprint
        before = "supervised fine-tuning, then " if tuned else ""
        lines[0] += f": {before}preference training with the objective `{losses}` on {protocols} comparisons."
        lines += _of_round(manifest, tuned)
    if trained and "joint" in trained["protocols"]:
        lines.append(
            "Joint comparisons set one instruction-response pair against another whose instruction may differ "
            "([Joint Preference Optimization](https://arxiv.org/abs/2404.00530))."
        )
    if exported.note:
        note = exported.note.replace(exported.base, _named(run, exported.base)) if exported.base else exported.note
        lines.append(note[0].upper() + note[1:].rstrip(".") + ".")
    return "\n".join(lines)


def _of_round(manifest: Manifest, tuned: bool) -> list[str]:
    """Of a model of on-policy rounds: which of them made it, from whose responses, beside which reference."""
    number, name = manifest.config.get("round"), manifest.config["train"]["name"]
    if number is None:
        return []
    first = "the SFT model" if tuned else "the model that training began with"
    before = first if number == 1 else f"`{name.removesuffix(f'-{number}')}-{number - 1}`"
    moved = (manifest.config.get("rounds") or {}).get("reference") == "moved"
    return [
        f"It is the model of on-policy round {number}: its comparisons are of responses that the model before it, "
        f"{before}, gave to the data's instructions. The reference is {before if moved else first}."
    ]


def _data(exported: Exported, config: dict[str, Any]) -> Iterator[str]:
    run, number = exported.run, exported.manifest.config.get("round")
    for path in _sources(config):
        yield f"`{_named(run, path)}`"
    where = run if number is None else RunDir(run.below(f"rounds/{number}"))
    items, judge = where.manifest("items"), where.manifest("judge")
    if items:
        counts, what = items.counts, "items" if number is None else "sampled responses"
        yield f"{counts['train_items']:,} {what} of {counts['train_instructions']:,} instructions to train on"
    if judge:
        who = _judge(run, judge.config.get("judge") or {}, "the labels of the data")
        yield f"{judge.counts.get('preferences', 0):,} preferences, judged by {who}"


def _judge(run: RunDir, section: dict[str, Any], unknown: str) -> str:
    """An annotator for people: its name, its kind and its model, where it has them."""
    kind = section.get("annotator")
    model = section.get("model") if kind in ("openai", "vllm", "reward_model") else None
    names = [section.get("name"), _named(run, str(model)) if model else None, kind]
    first, *more = list(dict.fromkeys(name for name in names if name)) or [unknown]
    return f"{first} ({', '.join(more)})" if more else str(first)


def _hyperparameters(config: dict[str, Any]) -> list[list[str]]:
    trained = config.get("train") or config.get("sft") or {}
    rows = []
    if "objective" in trained:
        entry = TrainConfig(**trained)
        rows = [["objective", entry.losses], *([key, f"{value:g}"] for key, value in entry.parameters().items())]
        for term in entry.also:
            rows += [[f"{term.objective}: {key}", f"{value:g}"] for key, value in term.parameters().items()]
    rows += _shown(trained)
    model = config.get("model") or {}
    return rows + [[key, _value(model[key])] for key in ("dtype", "load_in_4bit", "max_length") if key in model]


def _of_sft(exported: Exported) -> list[list[str]]:
    """The keys of the fine-tuning that a preference training began from."""
    sft = exported.run.manifest("sft")
    if sft is None or exported.manifest.inputs.get("sft") != sft.fingerprint:
        return []
    return [[f"sft: {key}", value] for key, value in _shown(sft.config.get("sft") or {})]


def _shown(trained: dict[str, Any]) -> list[list[str]]:
    left_out = set() if trained.get("use_peft", False) else WITHOUT_LORA
    return [[key, _value(trained[key])] for key in SHOWN if trained.get(key) is not None and key not in left_out]


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
    judge = _judge(run, evaluated.config.get("judge") or {}, "the run's judge")
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
    config, base = exported.manifest.config, exported.base
    if exported.kind != "adapter":
        return how_to_use(config["model"]["template"])
    named = base if base and is_on_hub(exported.run, base) else "BASE"
    return how_to_use(config["model"]["template"], base=named, rank=config["train"]["lora_r"])
