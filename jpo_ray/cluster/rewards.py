"""Reward models as judges: every item is scored once, in Ray actors, and its score is kept for other runs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jpo_ray.cache import append_part, cache_folder, key_folder, read_parts
from jpo_ray.cluster.session import Cluster, map_on_actors
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import Progress, ScoreItems, Texts, finite

KIND = "rewards"
SCORES = pa.schema([("item_id", pa.string()), ("score", pa.float64())])
BATCH = 16  # items of similar length per forward pass
KEPT_AT_ONCE = 2048  # scores: what a kill loses at most


def reward_scores(config: AnnotatorConfig, cluster: Cluster) -> ScoreItems:
    """Scores of items under the sequence classifier `config.model`. Raises `InputError` where it is none.

    An item that is longer than the model (or `config.max_length`) takes has no score: half a response is another one.
    """
    from jpo_ray.engine.model import model_hash, resolve_model

    folder = resolve_model(config.model, "judge.model").resolve()
    cache = cache_folder()
    key = {"model": model_hash(folder, cache), "max_length": config.max_length, "dtype": "float32"}

    def score_items(texts: Texts, progress: Progress) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        for part in read_parts(key_folder(cache, KIND, key), SCORES):
            known = zip(part["item_id"].to_pylist(), part["score"].to_pylist(), strict=True)
            found |= {item: finite(score) for item, score in known if item in texts}
        missing = {item: text for item, text in texts.items() if item not in found}
        fresh: dict[str, float] = {}
        for items, scores, reasons in _scored(folder, config.max_length, cluster, missing):
            fresh |= {item: score for item, score, reason in zip(items, scores, reasons, strict=True) if not reason}
            given = zip(items, scores, reasons, strict=True)
            found |= {item: reason or finite(score) for item, score, reason in given}
            if len(fresh) >= KEPT_AT_ONCE:
                keep(fresh)
                fresh = {}
            progress(len(found) / len(texts), f"{len(found):,} of {len(texts):,} items scored")
        keep(fresh)
        return found

    def keep(scores: dict[str, float]) -> None:
        if scores:
            columns = {"item_id": list(scores), "score": list(scores.values())}
            append_part(key_folder(cache, KIND, key), key, pa.Table.from_pydict(columns, SCORES))

    return score_items


def _scored(
    folder: Path, max_length: int | None, cluster: Cluster, texts: Texts
) -> Iterator[tuple[list[str], list[float], list[str]]]:
    """Item ids, their scores, and why one has none, as batches are done."""
    if not texts:
        return
    ids = sorted(texts, key=lambda item: (sum(map(len, texts[item])), item))
    batches = [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
    rows = [
        {
            "batch": number,
            "instructions": [texts[item][0] for item in items],
            "responses": [texts[item][1] for item in items],
        }
        for number, items in enumerate(batches)
    ]
    for row in map_on_actors(cluster.ray(), cluster.config, cluster.stage, rows, RewardActor, str(folder), max_length):
        if row["error"]:
            raise InputError(f"judge.model: {row['error']}")
        yield batches[row["batch"]], row["scores"].tolist(), list(row["reasons"])


class RewardActor:
    """Actor that scores batches of items, a row each. What is wrong comes back as a row too."""

    def __init__(self, folder: str, max_length: int | None, device: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._error, self._scorer = "", None
        try:
            self._scorer = RewardModel(Path(folder), max_length, device)
        except InputError as wrong:
            self._error = str(wrong)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (instructions,), (responses,) = batch["instructions"], batch["responses"]
        scores, reasons = np.zeros(len(instructions)), [""] * len(instructions)
        if self._scorer is not None:
            scores, reasons = self._scorer.score(list(instructions), list(responses))
        return {"batch": batch["batch"], "scores": [scores], "reasons": [reasons], "error": [self._error]}


class RewardModel:
    """A sequence classifier with one output, in float32. Raises `InputError` where the folder holds another model."""

    def __init__(self, folder: Path, max_length: int | None, device: str) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        from jpo_ray.engine.model import load_tokenizer

        config = AutoConfig.from_pretrained(folder)
        if config.num_labels != 1 or not any("SequenceClassification" in name for name in config.architectures or []):
            kind = ", ".join(config.architectures or ["a model without architecture"])
            raise InputError(f"{folder}: is {kind} with {config.num_labels} outputs; a reward model has one score")
        self._tokenizer = load_tokenizer(folder, generates=False)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="float32", use_safetensors=True, device_map=device
        ).eval()
        self._model.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id  # tells where a text ends
        # Some models have positions that no token may take (RoBERTa's padding), which only the tokenizer knows.
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        known = [limit for limit in (max_length, positions, self._tokenizer.model_max_length) if limit]
        self._limit = min(known)  # a tokenizer without a limit has a huge one

    def score(self, instructions: Sequence[str], responses: Sequence[str]) -> tuple[Any, list[str]]:
        """float64[N] of scores, and for each item why it has none (or nothing)."""
        import torch

        encoded = [self._encode(*pair) for pair in zip(instructions, responses, strict=True)]
        lengths = [len(each["input_ids"]) for each in encoded]
        fits = [number for number, length in enumerate(lengths) if length <= self._limit]
        scores = np.zeros(len(encoded))
        if fits:
            padded = self._tokenizer.pad([encoded[number] for number in fits], return_tensors="pt")
            with torch.no_grad():
                logits = self._model(**padded.to(self._model.device)).logits
            scores[fits] = logits[:, 0].double().cpu().numpy()
        kept = set(fits)
        reasons = [
            "" if number in kept else f"has {length} tokens, the reward model takes {self._limit}"
            for number, length in enumerate(lengths)
        ]
        return scores, reasons

    def _encode(self, instruction: str, response: str) -> dict[str, Any]:
        """By the model's chat template, else as a pair of texts."""
        if self._tokenizer.chat_template is None:
            return dict(self._tokenizer(instruction, response))
        chat = [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
        return dict(self._tokenizer.apply_chat_template(chat, return_dict=True))
