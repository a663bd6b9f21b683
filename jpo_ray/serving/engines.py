"""The engines behind the endpoint: vLLM in this replica, or another model's replicas."""

import json
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from jpo_ray.serving.bodies import shorten

INPUT_ERRORS = (400, 404, 422)
INTERNAL = "the engine failed"


class EngineError(Exception):
    """What an engine answers instead of text."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Engine(Protocol):
    """One base model's engine."""

    def generate(self, kind: str, fields: dict[str, Any], request_id: str) -> AsyncGenerator[str, None]:
        """Answers to a request of vLLM's own kind (`chat` or `completions`): one JSON text, or server-sent events."""
        ...


class LocalEngine:
    """The engine of a `ray.serve.llm` server in this process."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def generate(self, kind: str, fields: dict[str, Any], request_id: str) -> AsyncGenerator[str, None]:
        from ray.llm._internal.serve.core.protocol import RawRequestInfo
        from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest

        request = (ChatCompletionRequest if kind == "chat" else CompletionRequest)(**fields)
        answers = getattr(self._engine, kind)(request, RawRequestInfo(headers={"x-request-id": request_id}))
        try:
            async for answer in answers:
                if isinstance(answer, str):
                    yield answer
                elif hasattr(answer, "error"):
                    raise _error(answer.error)
                else:
                    yield answer.model_dump_json()
        finally:
            await answers.aclose()


class RemoteEngine:
    """The engine of another deployment, through its handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle.options(stream=True)

    async def generate(self, kind: str, fields: dict[str, Any], request_id: str) -> AsyncGenerator[str, None]:
        answers = self._handle.generate.remote(kind, fields, request_id)
        try:
            async for answer in answers:
                if answer.startswith("error "):  # exceptions of one's own do not cross processes as themselves
                    raise EngineError(**json.loads(answer.removeprefix("error ")))
                yield answer
        finally:  # of a client that left, too
            answers.cancel()


def _error(error: Any) -> EngineError:
    """The engine's own words where the request was at fault, and none of its internals where it was not."""
    status = int(error.code)
    message = shorten(str(error.message), 200) if status in INPUT_ERRORS else INTERNAL
    return EngineError(message, status if status in INPUT_ERRORS else 500)
