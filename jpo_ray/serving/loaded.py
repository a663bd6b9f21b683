"""Which adapters an engine holds: loaded when they are first asked for, taken out when they are off the list.

On CPUs vLLM gives base-model rows the weights of the last adapter slot whenever that slot is taken. The engine has
therefore one slot more than `max_adapters`, and never holds more than `max_adapters` at a time: a removed adapter makes
room before another one comes.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from jpo_ray.serving.adapter_checks import AdapterError
from jpo_ray.serving.adapters import AdapterStore, Listed, name_taken, no_adapter
from jpo_ray.serving.guard import LOGGER

ROOM_TIMEOUT_S = 30.0  # for answers of removed adapters to end
Result = TypeVar("Result")


async def finished(changing: Coroutine[Any, Any, Result]) -> Result:
    """What changes the engine's adapters, done to its end even where the client leaves meanwhile: weights that nobody
    knows of would take the slot that must stay empty.
    """
    return await asyncio.shield(asyncio.create_task(changing))


class LoadedAdapters:
    """The adapters in one engine of `ray.serve.llm`."""

    def __init__(self, engine: Any, store: AdapterStore, max_adapters: int) -> None:
        self._engine, self._store, self._most = engine, store, max_adapters
        self._loaded: dict[str, Listed] = {}
        self._leaving: dict[int, Listed] = {}  # off the list, but still answering: engine id -> adapter
        self._in_use: Counter[str] = Counter()  # answers under way by folder
        self._changing = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def held(self, entry: Listed) -> AsyncIterator[None]:
        """The adapter is in the engine until the block ends. Raises `AdapterError` where it cannot be loaded."""
        self._in_use[entry.folder] += 1  # before it is loaded: nobody takes it out in between
        try:
            if self._loaded.get(entry.name) != entry or len(self._loaded) > len(self._store.listed()):
                await finished(self._load(entry))
            yield
        finally:
            self._in_use[entry.folder] -= 1
            if self._leaving and not self._in_use[entry.folder]:
                async with self._changing:
                    await self._let_go()

    async def load_listed(self) -> None:
        """Load every adapter on the list that can be had; whoever asks for another is told."""
        for entry in list(self._store.listed().values()):
            with suppress(AdapterError):
                async with self.held(entry):
                    pass

    async def try_out(self, entry: Listed) -> None:
        """Load an adapter that is not on the list yet. Raises `AdapterError` where the engine does not take it."""
        async with self._changing:
            await self._sync()
            if entry.name in self._store.listed():  # the engine would answer for it with the one that it has
                raise name_taken(entry.name)
            await self._put_in(entry)

    async def forget(self) -> None:
        """Take out what is off the list."""
        async with self._changing:
            await self._sync()

    async def _load(self, entry: Listed) -> None:
        async with self._changing:
            await self._sync()
            if self._loaded.get(entry.name) == entry:
                return
            try:
                await self._put_in(entry)
            except AdapterError as error:
                if self._store.listed().get(entry.name) != entry:  # removed while it was asked for
                    raise no_adapter() from error
                raise

    async def _sync(self) -> None:
        listed = self._store.listed()
        for name, entry in list(self._loaded.items()):
            if listed.get(name) != entry:
                request = self._engine._oai_models.lora_requests.pop(name)
                del self._loaded[name]
                self._leaving[request.lora_int_id] = entry
        await self._let_go()

    async def _let_go(self) -> None:
        for number, entry in list(self._leaving.items()):
            if not self._in_use[entry.folder]:
                await self._engine._engine_client.remove_lora(number)
                del self._leaving[number]
                self._freed.set()

    async def _put_in(self, entry: Listed) -> None:
        from ray.llm._internal.serve.core.configs.llm_config import DiskMultiplexConfig

        await self._room()
        wanted = DiskMultiplexConfig(
            model_id=entry.name, max_total_tokens=None, local_path=entry.folder, lora_assigned_int_id=-1
        )
        try:
            await self._engine.resolve_lora(wanted)
        except Exception as error:
            LOGGER.warning("%s cannot be loaded", entry.name, exc_info=error)
            raise AdapterError(f"{entry.name}: the engine does not take it; its log has the reason") from error
        self._loaded[entry.name] = entry

    async def _room(self) -> None:
        """Wait until the engine holds fewer than `max_adapters`; the lock is let go meanwhile."""
        deadline = asyncio.get_running_loop().time() + ROOM_TIMEOUT_S
        while len(self._loaded) + len(self._leaving) >= self._most:
            self._freed.clear()
            self._changing.release()
            try:
                await asyncio.wait_for(self._freed.wait(), deadline - asyncio.get_running_loop().time())
            except TimeoutError as error:
                raise AdapterError("removed adapters are still answering; try again", 503) from error
            finally:
                await self._changing.acquire()
