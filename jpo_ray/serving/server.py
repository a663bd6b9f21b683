"""The deployments: `ray.serve.llm` servers, the first of which has the HTTP routes, and the scorer."""

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
from ray.serve.llm.deployment import LLMServer

from jpo_ray.config_serve import ServeConfig
from jpo_ray.serving.adapters import AdapterStore
from jpo_ray.serving.catalogue import Catalogue
from jpo_ray.serving.engines import EngineError, LocalEngine, RemoteEngine
from jpo_ray.serving.guard import LOGGER, Guard
from jpo_ray.serving.keys import read_keys, require_keys
from jpo_ray.serving.listening import host_served_at
from jpo_ray.serving.loaded import LoadedAdapters
from jpo_ray.serving.orphans import end_children_with_this_process
from jpo_ray.serving.plan import Plan
from jpo_ray.serving.prompts import Prompts
from jpo_ray.serving.routes import Routes
from jpo_ray.serving.telemetry import Telemetry


class ModelServer(LLMServer):  # type: ignore[misc]
    """One engine, reached through its handle by the front."""

    async def __init__(self, llm_config: LLMConfig) -> None:  # type: ignore[misc]
        await super().__init__(llm_config)
        self._watcher = end_children_with_this_process()
        self.local = LocalEngine(self.engine)

    async def generate(self, kind: str, fields: dict[str, Any], request_id: str) -> AsyncGenerator[str, None]:
        """What `LocalEngine.generate` gives; an error is told as a piece that begins with `error `."""
        try:
            async for answer in self.local.generate(kind, fields, request_id):
                yield answer
        except EngineError as error:
            yield "error " + json.dumps({"message": str(error), "status": error.status})


class FrontServer(ModelServer):
    """The engine of the SFT model and its adapters, with the HTTP routes of the whole endpoint in the same process.

    Requests then go from Serve's proxy to the engine in one step; no ingress deployment stands between.
    """

    async def __init__(  # type: ignore[misc]
        self, llm_config: LLMConfig, plan: Plan, config: ServeConfig, others: dict[str, Any], scorer: Any
    ) -> None:
        self._keys = read_keys(config)
        require_keys(self._keys, config.host, host_served_at())
        for warning in plan.warnings:
            LOGGER.warning(warning)
        if plan.keys_required and not self._keys:
            raise RuntimeError("the server was started with API keys and this node has none; set keys_file")
        await super().__init__(llm_config)
        self._plan, self._config = plan, config
        self._others, self._scorer = others, scorer
        self._store: AdapterStore = plan.store(config.scoring.beta if config.scoring else 0.1)
        self._loaded = LoadedAdapters(self.engine, self._store, plan.max_adapters)
        await self._loaded.load_listed()

    async def __serve_build_asgi_app__(self) -> Guard:
        from jpo_ray.engine.model import load_tokenizer

        front, *others = self._plan.engines
        engines = {front.name: self.local} | {one.name: RemoteEngine(self._others[one.name]) for one in others}
        catalogue = Catalogue(self._plan, engines, self._store, self._loaded, self, self._scorer)
        plan = self._plan
        prompts = Prompts(load_tokenizer(Path(plan.base)), plan.layout, plan.max_model_len, plan.vocabulary)
        telemetry = Telemetry()
        routes = Routes(self._config, catalogue, prompts, telemetry)
        return Guard(routes.app(), self._config, self._keys, telemetry)
