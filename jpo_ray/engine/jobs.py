"""What a training worker runs, from artifacts on disk to a trained model on disk. Works without Ray, in one process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import torch.distributed as dist

from jpo_ray import records, shards
from jpo_ray.config import BaseModelConfig
from jpo_ray.config_training import OptimizerConfig, SFTConfig, TrainConfig
from jpo_ray.data.tokens import Layout, TokenizedItems, tokenize
from jpo_ray.engine.adapters import record_base
from jpo_ray.engine.checkpoints import agreed_checkpoint
from jpo_ray.engine.dataset import EdgeList, EdgeShards, PreferenceData, mismatched_rows
from jpo_ray.engine.loop import Progress, train
from jpo_ray.engine.model import DTYPES, load_model, load_policy, load_tokenizer, weights_hash
from jpo_ray.engine.reading import items_read, read_edges
from jpo_ray.engine.scoring import Scorer, make_scorer
from jpo_ray.engine.sharding import shard
from jpo_ray.engine.tasks import check_margins, preference_task, sft_task
from jpo_ray.engine.tracking import Tracking
from jpo_ray.engine.workers import rank_and_world
from jpo_ray.errors import InputError


@dataclass(frozen=True)
class PreferenceInputs:
    """Where the `train` stage reads: folders of the SFT model and of artifacts (None: not needed)."""

    model: Path
    items: Path
    judge: Path
    reference: Path | None
    embeddings: Path | None = None
    weights: str | None = None  # hash of the model's, where it is known


def layout_of(model: BaseModelConfig) -> Layout:
    return Layout(model.template, model.response_prefix, model.max_length)


def train_sft(
    out: Path,
    device: str,
    progress: Progress | None,
    base: Path,
    items: Path,
    model: BaseModelConfig,
    config: SFTConfig,
    tracking: Tracking | None = None,
) -> dict[str, Any]:
    """Fine-tune all parameters on the split `sft`, else on D_S, the loss on the responses; returns the trainer state
    with data counts.
    """
    tokenizer = load_tokenizer(base)
    table = records.read_table(items / "items.parquet", records.ITEMS)
    trained_on = "sft" if "sft" in table["split"].to_pylist() else "train"
    rows = [row for row in table.to_pylist() if row["sft"] and row["split"] in (trained_on, "validation")]
    tokens = _tokenize(tokenizer, model, rows)
    of_split = {split: _numbers(row["split"] == split for row in rows) for split in (trained_on, "validation")}
    if not len(of_split[trained_on]):
        raise InputError("sft: no training items; check items.train")
    policy = load_model(base, dtype="float32", device=_loads_on(device, config))
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    scorer = _spread(make_scorer(policy, dropout_seed=_seed(config), autocast=_autocast(model)), config, device)
    ids = [row["item_id"] for row in rows]
    task = sft_task(scorer, tokens, of_split[trained_on], of_split["validation"], config, _seed(config), ids)
    state = train(
        policy, tokenizer, task, config, out, progress=progress, final_dtype=DTYPES[model.dtype], tracking=tracking
    )
    return state | {"truncated": tokens.truncated, "items": len(of_split[trained_on])}


def train_preferences(
    out: Path,
    device: str,
    progress: Progress | None,
    inputs: PreferenceInputs,
    model: BaseModelConfig,
    config: TrainConfig,
    total_steps: int | None,
    tracking: Tracking | None = None,
) -> dict[str, Any]:
    """Train one entry of `train`; returns the trainer state with data counts."""
    tokenizer = load_tokenizer(inputs.model)
    data = load_preferences(tokenizer, inputs, model, config)
    policy = load_policy(inputs.model, model, config, seed=_seed(config), device=_loads_on(device, config))
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
        if config.use_peft:
            policy.enable_input_require_grads()
    autocast = None if config.use_peft else _autocast(model)
    scorer = _spread(make_scorer(policy, dropout_seed=_seed(config), autocast=autocast), config, device)
    # Before the first update the policy is the reference, unless it goes on from another training.
    fresh = agreed_checkpoint(out) is None and config.continue_from is None
    if data.reference is not None and fresh:
        check_margins(scorer, data, config, model.dtype)
    task = preference_task(scorer, data, config, _seed(config), total_steps)
    final_dtype = None if config.use_peft else DTYPES[model.dtype]
    state = train(policy, tokenizer, task, config, out, progress=progress, final_dtype=final_dtype, tracking=tracking)
    if config.use_peft and rank_and_world()[0] == 0:
        weights = inputs.weights or weights_hash(inputs.model)
        record_base(out, inputs.model, weights, load_in_4bit=model.load_in_4bit)
    return state | {
        "truncated": data.tokens.truncated,
        "comparisons": min(data.train.count, config.max_train_comparisons or data.train.count),
        "items_per_comparison": _items_per_comparison(state),
        "validation_comparisons": len(data.validation),
    }


def load_preferences(
    tokenizer: Any, inputs: PreferenceInputs, model: BaseModelConfig, config: TrainConfig
) -> PreferenceData:
    """Items, edges and what the objective reads besides. Raises `InputError` where an artifact lacks any of it."""
    items = records.read_table(inputs.items / "items.parquet", records.ITEMS).to_pylist()
    files = shards.files_of(inputs.judge / "preferences.parquet")
    used = set(shards.distinct_values(files, ["chosen", "rejected"]).to_pylist())
    rows = [row for row in items if row["item_id"] in used]
    row_of = {row["item_id"]: number for number, row in enumerate(rows)}
    train_edges, validation_edges = read_edges(files, pa.array(list(row_of), pa.string()), config)
    if not train_edges.count:
        raise InputError(
            f"train.{config.name}: no decisive {' or '.join(config.protocols)} preferences to train on; "
            "check pairs, judge and train.protocols"
        )
    if "gap" in config.reads:
        _require_gaps(config, train_edges, validation_edges)
    scored, reference = rows, None
    if "reference" in config.reads:
        assert inputs.reference is not None
        table = records.read_table(inputs.reference / "reference.parquet", records.REFERENCE)
        partners = _partners(table, row_of) if "mismatched" in config.reads else {}
        scored = rows + mismatched_rows(rows, partners, {row["item_id"]: row for row in items})
        reference = _reference_of(table, rows, partners)
        _require_reference(reference, rows, partners, files, config)
    return PreferenceData(
        tokens=_tokenize(tokenizer, model, scored),
        reference=reference,
        items=len(rows),
        train=train_edges,
        validation=validation_edges,
        embeddings=_embeddings_of(inputs, rows) if "embedding" in config.reads else None,
        item_ids=list(row_of),
    )


def _require_gaps(config: TrainConfig, train: EdgeShards, validation: EdgeList) -> None:
    lacking, count = int(np.isnan(validation.gap).sum()), train.count + len(validation)
    lacking += sum(int(np.isnan(train[number].gap).sum()) for number in range(len(train.sizes)))
    if lacking:
        needing = "a curriculum by gap" if all(term.objective != "odpo" for term in config.terms) else "odpo"
        raise InputError(
            f"train.{config.name}: {needing} needs to know by how much each chosen item is better, and {lacking} of "
            f"{count} comparisons do not say; judge by scores (judge.annotator: ratings or reward_model) or with "
            "judge.soft, and without judge.closure"
        )


def _embeddings_of(inputs: PreferenceInputs, rows: Sequence[dict[str, Any]]) -> npt.NDArray[np.float16]:
    """The instruction's vector of each item, of norm 1."""
    assert inputs.embeddings is not None
    table = records.read_table(inputs.embeddings / "embeddings.parquet", records.EMBEDDINGS)
    place = {name: number for number, name in enumerate(table["instruction_id"].to_pylist())}
    vectors = np.stack(table["vector"].to_numpy())
    return vectors[[place[row["instruction_id"]] for row in rows]]


def _partners(reference: pa.Table, used: Mapping[str, int]) -> dict[str, str]:
    """The items whose responses stand with the other items' instructions; one without any has itself."""
    pairs = zip(reference["item_id"].to_pylist(), reference["response_of"].to_pylist(), strict=True)
    partners = {item: response_of for item, response_of in pairs if item != response_of}
    return {item: partners.get(item, item) for item in used}


def _reference_of(reference: pa.Table, rows: Sequence[dict[str, Any]], partners: dict[str, str]) -> Any:
    """float64[rows, 2] of the items and of the mismatched ones; NaN where the reference has none."""
    names = ("item_id", "response_of", "instruction_logprob", "response_logprob")
    columns = (reference[name].to_pylist() for name in names)
    found = {(item, source): (i, r) for item, source, i, r in zip(*columns, strict=True)}
    wanted = [(row["item_id"], row["item_id"]) for row in rows]
    wanted += [(row["item_id"], partners[row["item_id"]]) for row in rows if row["item_id"] in partners]
    return np.array([found.get(key, (np.nan, np.nan)) for key in wanted], dtype=np.float64).reshape(-1, 2)


def _require_reference(
    reference: Any, rows: Sequence[dict[str, Any]], partners: dict[str, str], files: Sequence[Path], config: TrainConfig
) -> None:
    """Raise `InputError` where an item lacks what the reference says of it. Of items that the entry does not read the
    reference need not say anything.
    """
    ids = [row["item_id"] for row in rows]
    unscored = np.isnan(reference[: len(rows), 1])
    alone = np.array([partners.get(item) == item for item in ids], dtype=bool)
    if not (unscored | alone).any():
        return
    read = items_read(files, pa.array(ids, pa.string()), [config])
    if missing := int((unscored & read).sum()):
        raise InputError(f"the reference lacks {missing} of {int(read.sum())} items; run `jpo reference` again")
    if (alone & read).any():
        raise InputError(
            f"train.{config.name}: kto compares with responses to other instructions and the reference has none; give "
            "data with more than one instruction and run `jpo reference` again"
        )


def _tokenize(tokenizer: Any, model: BaseModelConfig, rows: Sequence[dict[str, Any]]) -> TokenizedItems:
    instructions, responses = [row["instruction"] for row in rows], [row["response"] for row in rows]
    return tokenize(tokenizer, layout_of(model), instructions, responses)


def _items_per_comparison(state: dict[str, Any]) -> float | None:
    """Distinct items that a step scored, per comparison, over all steps: 2 without any sharing."""
    logged = [entry for entry in state["log_history"] if "joint/items" in entry]
    edges = sum(entry["joint/edges"] for entry in logged)
    return round(sum(entry["joint/items"] for entry in logged) / edges, 3) if edges else None


def _shards(config: OptimizerConfig) -> bool:
    return config.sharding == "fsdp2" and dist.is_available() and dist.is_initialized()


def _loads_on(device: str, config: OptimizerConfig) -> str:
    """A model to be sharded may be too large for one GPU."""
    return "cpu" if _shards(config) else device


def _spread(scorer: Scorer, config: OptimizerConfig, device: str) -> Scorer:
    """The scorer on the workers as `sharding` asks."""
    return shard(scorer, torch.device(device)) if _shards(config) else scorer


def _numbers(flags: Any) -> Any:
    return np.flatnonzero(np.fromiter(flags, dtype=bool))


def _seed(config: SFTConfig | TrainConfig) -> int:
    return config.seed or 0


def _autocast(model: BaseModelConfig) -> torch.dtype | None:
    return DTYPES["bfloat16"] if model.dtype == "bfloat16" else None
