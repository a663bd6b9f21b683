"""The models of one endpoint by name, wherever they run."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from jpo_ray.serving.adapter_checks import AdapterError
from jpo_ray.serving.adapters import AdapterStore, name_taken
from jpo_ray.serving.engines import Engine, EngineError
from jpo_ray.serving.loaded import LoadedAdapters, finished
from jpo_ray.serving.models import adapter_warnings
from jpo_ray.serving.plan import Plan
from jpo_ray.serving.policies import GONE, PARTS, Scores


class UnknownModel(KeyError):
    """No model of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class Catalogue:
    def __init__(
        self,
        plan: Plan,
        engines: Mapping[str, Engine],
        store: AdapterStore,
        loaded: LoadedAdapters,
        server: Any,
        scorer: Any,
    ) -> None:
        self._plan, self._engines, self._store, self._loaded = plan, engines, store, loaded
        self._server, self._scorer = server, scorer
        self.response_prefix = plan.layout.response_prefix

    async def check_engine(self) -> None:
        await self._server.check_health()

    def cards(self) -> list[dict[str, Any]]:
        """Every model as `/v1/models` shows it."""
        whole = [_card(engine.name, None, None) for engine in self._plan.engines]
        front = self._plan.engines[0].name
        return whole + [_card(entry.name, front, entry.beta) for entry in self._store.listed().values()]

    def card(self, name: str) -> dict[str, Any]:
        found = next((card for card in self.cards() if card["id"] == name), None)
        if found is None:
            raise UnknownModel(name)
        return found

    @asynccontextmanager
    async def generating(
        self, kind: str, fields: dict[str, Any], request_id: str
    ) -> AsyncIterator[AsyncGenerator[str, None]]:
        """Answers of the model that `fields` names. Raises `UnknownModel`."""
        name = fields["model"]
        if name in self._engines:
            async with aclosing(self._engines[name].generate(kind, fields, request_id)) as answers:
                yield answers
            return
        entry = self._store.listed().get(name)
        if entry is None:
            raise UnknownModel(name)
        async with self._loaded.held(entry):
            front = self._engines[self._plan.engines[0].name]
            async with aclosing(front.generate(kind, fields, request_id)) as answers:
                yield answers

    async def score(self, name: str, items: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """Implicit rewards of instruction-response pairs under a model. Raises `UnknownModel`."""
        if self._scorer is None:
            raise AdapterError("this server does not score (scoring: null)", 404)
        self.card(name)
        scores: Scores = await self._scorer.score.remote(name, items)
        if scores == GONE:  # since the line above
            raise UnknownModel(name)
        if isinstance(scores, str):
            raise EngineError("this model cannot be scored; the server's log has the reason", 500)
        if not all(math.isfinite(entry[part]) for entry in scores for part in PARTS):
            raise AdapterError("the log-probabilities under this model are no finite numbers")
        return scores

    async def add_adapter(self, name: str, folder: str) -> list[str]:
        """Add an adapter to all replicas; returns what is odd about it. Raises `AdapterError`."""
        return await finished(self._add_adapter(name, folder))

    async def _add_adapter(self, name: str, folder: str) -> list[str]:
        if any(engine.name == name for engine in self._plan.engines):
            raise AdapterError(f"`{name}` is a model of this server already", 409)
        allowed = [Path(root) for root in self._plan.adapter_folders]
        if name in self._store.listed():
            raise name_taken(name)
        if len(self._store.listed()) >= self._plan.max_adapters:
            raise AdapterError(f"{self._plan.max_adapters} adapters are served already; remove one first", 409)
        entry = await asyncio.to_thread(self._store.prepare, name, folder, allowed)
        try:
            await self._loaded.try_out(entry)
            await asyncio.to_thread(self._store.add, entry)
        finally:  # engine and disk keep what is on the list now
            await self._loaded.forget()
            await asyncio.to_thread(self._store.discard, entry)
        base = Path(self._plan.engines[0].folder)
        return await asyncio.to_thread(adapter_warnings, name, Path(entry.source), base, self._plan.dtype)

    async def remove_adapter(self, name: str) -> None:
        """Take an adapter off all replicas; answers under way are finished. Raises `AdapterError`."""
        await finished(self._remove_adapter(name))

    async def _remove_adapter(self, name: str) -> None:
        await asyncio.to_thread(self._store.remove, name)
        await self._loaded.forget()


def _card(name: str, parent: str | None, beta: float | None) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": 0, "owned_by": "jpo-ray", "parent": parent}
    return card | ({"beta": beta} if beta is not None else {})
