"""The SFT model, adapters on it and whole models, ready to score with the engine that trained them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jpo_ray.data.tokens import TokenizedItems, tokenize
from jpo_ray.serving.adapters import AdapterStore, Listed
from jpo_ray.serving.guard import LOGGER
from jpo_ray.serving.plan import EnginePlan, Plan

PASS_TOKENS = 4096  # that go through the model at a time
PARTS = ("instruction", "response")
Asked = tuple[str, list[tuple[str, str]]]  # a model, and items as (instruction, response)
GONE, FAILED = "gone", "failed"  # why there are no scores
Scores = list[dict[str, Any]] | str  # of each item; or one of these


class Policies:
    """The SFT model, adapters on it and whole models, ready to score."""

    def __init__(self, plan: Plan, store: AdapterStore, device: str) -> None:
        from jpo_ray.engine.model import load_model, load_tokenizer

        self._plan, self._store = plan, store
        self._options: dict[str, Any] = {"dtype": plan.dtype, "device": device}
        self._tokenizer = load_tokenizer(Path(plan.base))
        self._model: Any = load_model(Path(plan.base), **self._options)
        self._scorer: Any = None  # made with the first adapter, or when first needed
        self._adapters: dict[str, str] = {}  # the server's folder of an adapter -> its name in peft
        self._whole: dict[str, Any] = {}
        for entry in store.listed().values():
            try:
                self._adapter(entry.folder)
            except Exception:
                LOGGER.exception("%s cannot be scored", entry.name)

    def score(self, asked: Sequence[Asked]) -> list[Scores]:
        """What `Scorer.score` gives, for several requests: the reference scores all their items in one go, and a model
        that fails fails its own requests alone.
        """
        items = list(dict.fromkeys(item for _, some in asked for item in some))
        row_of = {item: row for row, item in enumerate(items)}
        tokens = self._tokens(items)
        reference = self._reference(tokens)
        found: dict[str, Scores] = {}
        for model in dict.fromkeys(name for name, _ in asked):
            rows = sorted({row_of[item] for name, some in asked if name == model for item in some})
            try:
                found[model] = self._of_model(model, tokens, rows, reference)
            except Exception:
                LOGGER.exception("scoring under %s failed", model)
                found[model] = FAILED if self._found(model) else GONE  # its files went with it
        return [_taken(found[name], [row_of[item] for item in some]) for name, some in asked]

    def _found(self, name: str) -> EnginePlan | Listed | None:
        """The model of that name; None for an adapter that was taken off the list since it was asked for."""
        engine = next((engine for engine in self._plan.engines if engine.name == name), None)
        return engine or self._store.listed().get(name)

    def _of_model(self, name: str, tokens: TokenizedItems, rows: list[int], reference: Any) -> Scores:
        """Scores by row of `tokens`, those of `rows` filled in."""
        model = self._found(name)
        if model is None:
            return GONE
        beta, policy = self._policy(model, tokens, rows)
        results: list[dict[str, Any]] = [{} for _ in range(len(tokens))]
        for place, row in enumerate(rows):
            ratio = (policy[place] - reference[row]) if policy is not None else np.zeros(2)
            parts = {part: float(beta * value) for part, value in zip(PARTS, ratio, strict=True)}
            counts = {
                "instruction_tokens": int(tokens.instruction_tokens[row]),
                "response_tokens": int(tokens.response_tokens[row]),
            }
            results[row] = {**parts, **counts, "beta": beta}
        return results

    def _policy(self, model: EnginePlan | Listed, tokens: TokenizedItems, rows: list[int]) -> tuple[float, Any]:
        """Beta and log-probs float64[rows, 2] of a model; None for the reference itself."""
        if isinstance(model, Listed):
            self._model.set_adapter(self._adapter(model.folder))
            return model.beta, self._pass(self._scorer, tokens, rows)
        if model.takes_adapters:
            return 0.0, None
        return float(model.beta or 0.0), self._pass(self._whole_scorer(model.name, model.folder), tokens, rows)

    def _reference(self, tokens: TokenizedItems) -> Any:
        from jpo_ray.engine.scoring import make_scorer

        rows = list(range(len(tokens)))
        if self._scorer is None:
            self._scorer = make_scorer(self._model)
        if not self._adapters:
            return self._pass(self._scorer, tokens, rows)
        with self._model.disable_adapter():
            return self._pass(self._scorer, tokens, rows)

    def _pass(self, scorer: Any, tokens: TokenizedItems, rows: list[int]) -> Any:
        import torch

        from jpo_ray.engine.scoring import score_items

        found = np.zeros((len(rows), 2))
        place = {row: index for index, row in enumerate(rows)}
        with torch.no_grad():
            for batch in scorer.micro_batches(tokens, np.array(rows), PASS_TOKENS):
                found[[place[row] for row in batch.tolist()]] = score_items(scorer, tokens, batch).cpu().numpy()
        return found

    def _adapter(self, folder: str) -> str:
        """Name in peft of an adapter, loaded if it is new; those off the list are let go."""
        from peft import PeftModel

        from jpo_ray.engine.scoring import make_scorer

        if folder in self._adapters:
            return self._adapters[folder]
        name = f"adapter_{len(self._adapters)}_{Path(folder).name.replace('.', '_')}"
        if not self._adapters:
            self._model = PeftModel.from_pretrained(self._model, folder, adapter_name=name, use_safetensors=True)
            self._model.eval()
            self._scorer = make_scorer(self._model)
        else:
            self._model.load_adapter(folder, adapter_name=name, use_safetensors=True)
            self._model.eval()
            kept = {entry.folder for entry in self._store.listed().values()}
            for gone in [known for known in self._adapters if known not in kept and known != folder]:
                self._model.delete_adapter(self._adapters.pop(gone))
        self._adapters[folder] = name
        return name

    def _whole_scorer(self, name: str, folder: str) -> Any:
        from jpo_ray.engine.model import load_model
        from jpo_ray.engine.scoring import make_scorer

        if name not in self._whole:
            self._whole[name] = make_scorer(load_model(Path(folder), **self._options))
        return self._whole[name]

    def _tokens(self, items: Sequence[tuple[str, str]]) -> TokenizedItems:
        return tokenize(self._tokenizer, self._plan.layout, [i for i, _ in items], [r for _, r in items])


def _taken(scores: Scores, rows: list[int]) -> Scores:
    return scores if isinstance(scores, str) else [scores[row] for row in rows]
