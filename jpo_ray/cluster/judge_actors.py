"""Actors that answer prompts in turn: started once, watched, and waited for no longer than the config says."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from jpo_ray.cluster.session import Cluster
from jpo_ray.errors import InputError
from jpo_ray.feedback.asking import AskOne, Model, Outcome
from jpo_ray.feedback.prompts import Messages

TIMEOUT = "cluster.actor_timeout_s"  # what the waits below are called in the config
BEAT_S = 2.0  # between an actor's sign of life and the next question for one
CLOSE_S = 30.0  # for engines to end by themselves
# An actor that dies is started again, and what it was asked is asked again.
SURVIVES = {"max_restarts": 3, "max_task_retries": 3}


def on_actors(cluster: Cluster, start: Callable[[Any], Sequence[Any]], timeout_s: float | None) -> Model:
    """Prompts go to the actors in turn. They start when the first is asked, and live until the command ends.

    Raises `TimeoutError` where an answer takes longer than `timeout_s` (None: as long as it takes), or an actor gives
    no sign of life for `cluster.actor_timeout_s`.
    """
    actors: list[Any] = []
    stage, alive_s = cluster.stage, cluster.config.actor_timeout_s

    async def lives(actor: Any) -> None:
        """Until the actor hangs: Ray starts a dead one again, but waits for ever for one that is stopped."""
        while True:
            await awaited(stage, alive_s, actor.ready.remote(), "a sign of life of a judge's actor")
            await asyncio.sleep(BEAT_S)

    @asynccontextmanager
    async def model() -> AsyncIterator[AskOne]:
        if not actors:
            actors.extend(start(cluster.ray()))
            cluster.stack.callback(_stop, cluster.ray(), actors)
            starting = [awaited(stage, alive_s, actor.ready.remote(), "a judge's actor to start") for actor in actors]
            for wrong in await asyncio.gather(*starting):
                if wrong:
                    raise InputError(f"judge: {wrong}")
        watches = [asyncio.create_task(lives(actor)) for actor in actors]
        turns = itertools.cycle(zip(actors, watches, strict=True))

        async def ask(messages: Messages) -> Outcome:
            actor, watch = next(turns)
            answer = asyncio.create_task(awaited(stage, timeout_s, actor.ask.remote(messages), "an answer"))
            await asyncio.wait({answer, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                answer.cancel()
                watch.result()
            outcome: Outcome = await answer
            return outcome

        try:
            yield ask
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)

    return model


async def awaited(stage: str, timeout_s: float | None, reference: Any, what: str) -> Any:
    """What `reference` becomes. Raises an error of one line where that takes longer, or the actor has died for good."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return await asyncio.wait_for(reference, timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, TimeoutError | RuntimeError):  # in the actor, which said so in one line
            raise error.cause from error
        raise
    except RayActorError as error:
        raise RuntimeError(
            f"{stage}: waited for {what}, but the actor has died and is not started again; Ray's logs tell why"
        ) from error
    except TimeoutError:
        raise too_long(stage, timeout_s, what) from None


def too_long(stage: str, timeout_s: float | None, what: str) -> TimeoutError:
    return TimeoutError(f"{stage}: waited {timeout_s:g} s ({TIMEOUT}) for {what}: it hangs, or the cluster is busy")


def _stop(ray: Any, actors: Sequence[Any]) -> None:
    """Let engines end their own processes, then end the actors."""
    ray.wait([actor.close.remote() for actor in actors], num_returns=len(actors), timeout=CLOSE_S)
    for actor in actors:
        ray.kill(actor)
