"""The HTTP routes, behind the guard: OpenAI's, scores, adapters and the page."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from jpo_ray.config_serve import ServeConfig
from jpo_ray.serving.adapter_checks import AdapterError
from jpo_ray.serving.bodies import (
    AdapterBody,
    BodyError,
    ChatBody,
    CompareBody,
    CompletionBody,
    Item,
    ScoreBody,
    read_body,
    shorten,
)
from jpo_ray.serving.catalogue import Catalogue, UnknownModel
from jpo_ray.serving.engines import EngineError
from jpo_ray.serving.guard import LOGGER, TooLarge, error_body, request_id
from jpo_ray.serving.prompts import Prompts
from jpo_ray.serving.rewards import compared, scored
from jpo_ray.serving.streams import Gathering, trim_answer, trimmed
from jpo_ray.serving.telemetry import Telemetry

PAGE = Path(__file__).parent / "page"
PAGE_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'"
Events = AsyncGenerator[str, None]
LONG_BODY = 10_000  # bytes; tokenizing fewer takes less than a change of threads costs under load
Asked = TypeVar("Asked")
Ids = TypeVar("Ids")
Handler = Callable[[Request], Awaitable[Response]]


class Routes:
    """The handlers, and what they share."""

    def __init__(self, config: ServeConfig, catalogue: Catalogue, prompts: Prompts, telemetry: Telemetry) -> None:
        self._config, self._catalogue, self._prompts, self._telemetry = config, catalogue, prompts, telemetry
        self._gathering = Gathering(config.stream_interval_s)

    def app(self) -> Starlette:
        of_server = [
            Route("/health", self._answered(self.health)),
            Route("/ready", self._answered(self.ready)),
            Route("/v1/models", self._answered(self.models)),
            Route("/v1/models/{name}", self._answered(self.model)),
            Route("/v1/chat/completions", self._answered(self.chat), methods=["POST"]),
            Route("/v1/completions", self._answered(self.completion), methods=["POST"]),
            Route("/v1/score", self._answered(self.score), methods=["POST"]),
            Route("/v1/compare", self._answered(self.compare), methods=["POST"]),
            Route("/v1/adapters", self._answered(self.add_adapter), methods=["POST"]),
            Route("/v1/adapters/{name}", self._answered(self.remove_adapter), methods=["DELETE"]),
        ]
        of_page = [
            Route(path, self._answered(_file(PAGE / name, kind)))
            for path, name, kind in (
                ("/", "index.html", "text/html"),
                ("/page.js", "page.js", "text/javascript"),
                ("/page.css", "page.css", "text/css"),
            )
        ]
        return Starlette(routes=[*of_server, *of_page], exception_handlers={HTTPException: _no_route})

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        try:
            await self._catalogue.check_engine()
        except Exception:
            return JSONResponse({"status": "the engine is not ready"}, 503)
        return JSONResponse({"status": "ready"})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._catalogue.cards()})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._catalogue.card(request.path_params["name"]))

    async def chat(self, request: Request) -> Response:
        body = read_body(ChatBody, await request.body())
        fields = body.engine_fields(self._config.limits)
        ids = await _tokenized(self._prompts.of_chat, body, len(await request.body()))
        fields["max_tokens"] = self._prompts.room([ids], fields["max_tokens"], wanted=body.answer_tokens() is not None)
        fields["messages"] = [{"role": "user", "content": ""}]  # the ids below are what is read
        fields["kv_transfer_params"] = {"prompt_token_ids": ids}
        prefix = self._catalogue.response_prefix
        if body.stream:
            return await self._stream("chat", fields, lambda events: trimmed(events, prefix, body.n or 1))
        answer = await self._whole("chat", fields)
        return JSONResponse(trim_answer(answer, prefix))

    async def completion(self, request: Request) -> Response:
        body = read_body(CompletionBody, await request.body())
        prompts = body.prompts()
        most = self._config.limits.max_n
        if len(prompts) * (body.n or 1) > most:
            raise BodyError(f"prompt: {len(prompts)} prompts of {body.n or 1} answers, at most {most} in all", "prompt")
        fields = body.engine_fields(self._config.limits)
        ids = await _tokenized(self._prompts.of_completion, body, len(await request.body()))
        fields["max_tokens"] = self._prompts.room(ids, fields["max_tokens"], wanted=body.max_tokens is not None)
        fields["prompt"] = ids if len(ids) > 1 else ids[0]
        if body.stream:
            return await self._stream("completions", fields, lambda events: events)
        return JSONResponse(await self._whole("completions", fields))

    async def score(self, request: Request) -> Response:
        body = read_body(ScoreBody, await request.body())
        items = {f"items.{index}": item for index, item in enumerate(body.items)}
        results = await self._scores(body.model, items, len(await request.body()))
        return JSONResponse({"object": "list", "model": body.model, "data": scored(results)})

    async def compare(self, request: Request) -> Response:
        body = read_body(CompareBody, await request.body())
        items = {f"pairs.{n}.{side}": item for n, pair in enumerate(body.pairs) for side, item in pair}
        results = await self._scores(body.model, items, len(await request.body()))
        data = compared(results, [pair.a.instruction == pair.b.instruction for pair in body.pairs])
        return JSONResponse({"object": "list", "model": body.model, "data": data})

    async def add_adapter(self, request: Request) -> Response:
        body = read_body(AdapterBody, await request.body())
        warnings = await self._catalogue.add_adapter(body.name, body.folder)
        return JSONResponse({**self._catalogue.card(body.name), "warnings": warnings}, 201)

    async def remove_adapter(self, request: Request) -> Response:
        name = request.path_params["name"]
        await self._catalogue.remove_adapter(name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    async def _scores(self, model: str, items: dict[str, Item], size: int) -> list[dict[str, Any]]:
        """Of items by their field in a body of so many bytes."""
        most = self._config.limits.max_items
        if len(items) > most:
            raise BodyError(f"{len(items)} instruction-response pairs, and this server takes {most} at a time")
        await _tokenized(self._prompts.require_scorable, items, size)
        return await self._catalogue.score(model, [(item.instruction, item.response) for item in items.values()])

    async def _whole(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        async with self._catalogue.generating(kind, fields, request_id.get()) as answers:
            async for answer in answers:
                return json.loads(answer)  # type: ignore[no-any-return]
        raise EngineError("the engine gave no answer", 500)

    async def _stream(self, kind: str, fields: dict[str, Any], shaped: Callable[[Events], Events]) -> Response:
        """The answer's stream, once its first event is there: what is wrong before it is still a plain error."""
        started = time.monotonic()
        generating = self._catalogue.generating(kind, fields, request_id.get())
        events = await generating.__aenter__()
        try:
            first = await anext(events)
        except BaseException as error:
            await generating.__aexit__(type(error), error, error.__traceback__)
            raise
        self._telemetry.first_token(fields["model"], time.monotonic() - started)

        async def body() -> AsyncGenerator[bytes, None]:
            try:
                async for piece in self._gathering.gathered(shaped(_again(first, events))):
                    yield piece
            finally:
                await generating.__aexit__(None, None, None)

        return StreamingResponse(body(), media_type="text/event-stream")

    def _answered(self, handler: Handler) -> Handler:
        """The handler, with an error in OpenAI's form for whatever it raises."""

        wait = {"retry-after": str(self._config.limits.retry_after_s)}

        @wraps(handler)
        async def answered(request: Request) -> Response:
            try:
                return await handler(request)
            except TooLarge as error:
                return _error(str(error), 413)
            except BodyError as error:
                return _error(str(error), error.status, error.param)
            except (AdapterError, EngineError) as error:
                return _error(str(error), error.status)
            except UnknownModel as error:
                return _error(f"there is no model `{shorten(str(error))}`; GET /v1/models lists them", 404, "model")
            except BackPressureError:
                return _error("too many requests are under way; try again", 429, headers=wait)
            except DeploymentUnavailableError:
                return _error("not ready; try again", 503, headers=wait)
            except Exception:
                LOGGER.exception("a request failed", extra={"jpo_request_id": request_id.get()})
                return _error(f"the server failed; its log has more under request {request_id.get()}", 500)

        return answered


async def _tokenized(tokenize: Callable[[Asked], Ids], body: Asked, size: int) -> Ids:
    """What `tokenize` makes of a body of so many bytes; a long one must not hold up the streams of others."""
    return await asyncio.to_thread(tokenize, body) if size > LONG_BODY else tokenize(body)


async def _again(first: str, rest: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    yield first
    async for event in rest:
        yield event


def _file(path: Path, kind: str) -> Handler:
    async def file(_: Request) -> Response:
        return FileResponse(path, media_type=kind, headers={"content-security-policy": PAGE_POLICY})

    return file


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    allow = getattr(error, "headers", None) or {}
    message = {404: "there is nothing here", 405: f"not by {shorten(request.method)}"}.get(status, "failed")
    return _error(message, status, headers=allow)


def _error(message: str, status: int, param: str | None = None, headers: Any = None) -> Response:
    return Response(error_body(message, status, param), status, headers, "application/json")
