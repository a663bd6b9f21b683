"""Language models as judges on the cluster: vLLM engines, or requests to an endpoint spread over actors."""

import asyncio
import itertools
import os
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jpo_ray.cluster.judge_actors import SURVIVES, awaited, on_actors, too_long
from jpo_ray.cluster.resources import as_options, await_resources, on_this_node, task_resources
from jpo_ray.cluster.sampling import engine_bundle, engine_env, require_vllm, split_over
from jpo_ray.cluster.session import Cluster
from jpo_ray.config_judge import AnnotatorConfig
from jpo_ray.errors import InputError
from jpo_ray.feedback.annotators import Annotator
from jpo_ray.feedback.answer_log import AnswerLog, Reply
from jpo_ray.feedback.asking import Asked, AskOne, Model, Outcome, ask_missing
from jpo_ray.feedback.endpoint import TOP_LOGPROBS, Service, opened, share_of_a
from jpo_ray.feedback.language_model import API_KEY, Bill, checked_key, language_model
from jpo_ray.feedback.meter import Meter, MeterLimits, Prices
from jpo_ray.feedback.prompts import Messages, load_prompts


@dataclass(frozen=True)
class LocalModel:
    """A language model that vLLM loads, and how it answers."""

    path: str  # a folder or Hugging Face id
    temperature: float = 0.0
    max_tokens: int = 16  # of an answer
    max_length: int | None = None  # tokens of prompt and answer; default: the model's
    soft: bool = False  # with log-probs


def vllm_annotator(config: AnnotatorConfig, cache: Path, cluster: Cluster) -> Annotator:
    """The annotator of `judge.annotator: vllm`, its answers kept under `cache`. Raises `InputError`."""
    from jpo_ray.engine.model import model_hash, resolve_model

    require_vllm("judge.annotator")
    folder = resolve_model(config.model, "judge.model").resolve()
    local = LocalModel(
        path=str(folder),
        temperature=config.temperature or 0.0,
        max_tokens=config.max_answer_tokens,
        max_length=config.max_length,
        soft=config.soft,
    )
    log = AnswerLog(cache, asdict(local) | {"engine": "vllm", "path": model_hash(folder, cache)})
    model = _engines(cluster, local, config.tensor_parallel_size)

    def ask(asked: Sequence[Messages], log: AnswerLog, advance: Callable[[int], None]) -> Asked:
        return ask_missing(model, asked, log, config.concurrency, advance)

    return language_model(config.called, ask, load_prompts(config.prompts), log, Prices(), config.max_unanswered)


def _engines(cluster: Cluster, model: LocalModel, parts: int) -> Model:
    """`model` on engines of so many parts, as many as `cluster` has actors; they start with the first prompt."""

    def start(ray: Any) -> list[Any]:
        config = cluster.config
        wanted = engine_bundle(config, parts)
        await_resources(ray, config, cluster.stage, [wanted] * config.num_actors)
        actor = ray.remote(VLLMJudge).options(
            **as_options(wanted),
            runtime_env={"env_vars": engine_env(ray, config, parts)},
            max_concurrency=1024,
            **SURVIVES,
        )
        return [actor.remote(model, parts, config.gpus_per_worker > 0) for _ in range(config.num_actors)]

    return on_actors(cluster, start, cluster.config.actor_timeout_s)


def spread_endpoint(cluster: Cluster, actors: int, service: Service, limits: MeterLimits) -> tuple[Model, Bill]:
    """An endpoint asked by several actors, all under one meter, which is an actor too."""
    meter = RemoteMeter(cluster, limits)

    def start(ray: Any) -> list[Any]:
        wanted = task_resources(cluster.config)
        await_resources(ray, cluster.config, cluster.stage, [wanted] * actors)
        actor = ray.remote(EndpointJudge).options(
            **as_options(wanted), max_concurrency=service.concurrency + 1, **SURVIVES
        )
        return [actor.remote(service, meter.actor(), cluster.config.actor_timeout_s) for _ in range(actors)]

    # A rate limit may hold an answer back for hours; each request has `judge.timeout_s`.
    return on_actors(cluster, start, None), meter.bill


class RemoteMeter:
    """A `Meter` in an actor of its own, started with the first request."""

    def __init__(self, cluster: Cluster, limits: MeterLimits) -> None:
        self._cluster, self._limits = cluster, limits
        self._actor: Any = None

    def actor(self) -> Any:
        if self._actor is None:
            ray = self._cluster.ray()
            here = on_this_node(ray)
            self._actor = ray.remote(Meter).options(num_cpus=0, scheduling_strategy=here).remote(self._limits)
            self._cluster.stack.callback(ray.kill, self._actor)
        return self._actor

    def bill(self, tokens: int, cost: float) -> tuple[int, float]:
        timeout_s = self._cluster.config.actor_timeout_s
        try:
            found: tuple[int, float] = self._cluster.ray().get(
                self.actor().bill.remote(tokens, cost), timeout=timeout_s
            )
        except TimeoutError:
            raise too_long(self._cluster.stage, timeout_s, "the meter of requests") from None
        return found


class _MeterHandle:
    """What an actor holds of a `RemoteMeter`, which must answer in `timeout_s`."""

    def __init__(self, actor: Any, timeout_s: float) -> None:
        self._actor, self._timeout_s = actor, timeout_s

    async def reserve(self, tokens: int, cost: float) -> float | str:
        found: float | str = await self._answer(self._actor.reserve.remote(tokens, cost))
        return found

    async def settle(self, tokens: int, cost: float) -> None:
        await self._answer(self._actor.settle.remote(tokens, cost))

    async def hold(self, seconds: float) -> None:
        await self._answer(self._actor.hold.remote(seconds))

    async def _answer(self, reference: Any) -> Any:
        return await awaited("judge", self._timeout_s, reference, "the meter of requests")


class EndpointJudge:
    """Actor that sends requests to an endpoint; it reads the key where it runs, so that no message carries it."""

    def __init__(self, service: Service, meter: Any, timeout_s: float) -> None:
        self._service, self._meter = service, _MeterHandle(meter, timeout_s)
        self._stack, self._starting = AsyncExitStack(), asyncio.Lock()
        self._ask: AskOne | None = None

    async def ready(self) -> str:
        """Empty, or why it cannot work."""
        async with self._starting:
            if self._ask is None:
                try:
                    key = checked_key(os.environ.get(API_KEY, ""))
                except InputError as error:
                    return f"on a node that is to send requests: {str(error).removeprefix('judge: ')}"
                self._ask = await self._stack.enter_async_context(opened(self._service, key, self._meter))
        return ""

    async def ask(self, messages: Messages) -> Outcome:
        wrong = await self.ready()  # an actor that was started again after a death is not
        if self._ask is None:
            return Outcome(stop=InputError(f"judge: {wrong}"))
        return await self._ask(messages)

    async def close(self) -> None:
        await self._stack.aclose()


class VLLMJudge:
    """Actor with one vLLM engine, which batches what is asked at the same time."""

    def __init__(self, model: LocalModel, parts: int, gpu: bool) -> None:
        self._model, self._parts, self._gpu = model, parts, gpu
        self._engine: Any = None
        self._tokenizer: Any = None
        self._starting = asyncio.Lock()
        self._numbers = itertools.count()

    async def ready(self) -> str:
        """Empty, or why it cannot work."""
        async with self._starting:
            if self._engine is None:
                from vllm import AsyncEngineArgs
                from vllm.v1.engine.async_llm import AsyncLLM

                arguments = AsyncEngineArgs(
                    model=self._model.path,
                    max_model_len=self._model.max_length,
                    load_format="safetensors",
                    enforce_eager=not self._gpu,
                    disable_log_stats=True,
                    **split_over(self._parts),
                )
                try:
                    self._engine = AsyncLLM.from_engine_args(arguments)
                except (ValueError, OSError, RuntimeError) as error:
                    said = (str(error).splitlines() or [type(error).__name__])[0][:300]
                    return f"vLLM cannot start {self._model.path}: {said} (its own words are in Ray's logs)"
                self._tokenizer = self._engine.get_tokenizer()
        return ""

    async def ask(self, messages: Messages) -> Outcome:
        if wrong := await self.ready():
            return Outcome(stop=InputError(f"judge: {wrong}"))
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        model, ids = self._model, chat_ids(self._tokenizer, messages)
        room = self._engine.model_config.max_model_len - model.max_tokens
        if len(ids) > room:
            return Outcome(final=True, reason=f"the prompt has {len(ids)} tokens, the model takes {room} and an answer")
        asked = SamplingParams(
            temperature=model.temperature,
            max_tokens=model.max_tokens,
            logprobs=TOP_LOGPROBS if model.soft else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        said = await self._said(TokensPrompt(prompt_token_ids=ids), asked)
        share = share_of_a({"content": list(map(_token, said.token_ids, said.logprobs))}) if model.soft else None
        return Outcome(Reply(said.text, len(ids), len(said.token_ids), share_a=share), requests=1)

    async def _said(self, prompt: Any, asked: Any) -> Any:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async for output in self._engine.generate(prompt, asked, str(next(self._numbers))):
                (said,) = output.outputs
                return said
        except EngineDeadError:
            # The engine's process is gone for good, but this one lives. Ray starts an actor again only if it dies, and
            # not if it leaves by `ray.actor.exit_actor()`.
            os._exit(1)
        raise RuntimeError("vLLM ended a request without an answer")

    async def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()


def chat_ids(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of a conversation by the model's chat template; where it has none, of its texts with blank lines."""
    if tokenizer.chat_template is not None:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    else:
        found = tokenizer("\n\n".join(message["content"] for message in messages) + "\n\n").input_ids
    return [int(token) for token in found]


def _token(chosen: int, alternatives: dict[int, Any]) -> dict[str, Any]:
    """A position in the form of OpenAI's log-probs."""
    named = [{"token": entry.decoded_token or "", "logprob": entry.logprob} for entry in alternatives.values()]
    return {"token": alternatives[chosen].decoded_token or "", "top_logprobs": named}
