"""Which adapters an engine holds, whatever comes in between: on an engine that remembers what it was told."""

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jpo_ray.serving.adapter_checks import AdapterError, base_shapes
from jpo_ray.serving.adapters import AdapterStore, Listed
from jpo_ray.serving.loaded import LoadedAdapters, finished
from serving.served_run import make_adapter

pytest.importorskip("vllm")


class Engine:
    """Loads and forgets adapters as `ray.serve.llm`'s does; each load takes a moment."""

    def __init__(self) -> None:
        self._oai_models = SimpleNamespace(lora_requests={})
        self._engine_client = self
        self.held: set[int] = set()

    async def resolve_lora(self, wanted: Any) -> None:
        await asyncio.sleep(0.02)
        if not Path(wanted.local_path).is_dir():
            raise RuntimeError("no such folder")
        number = wanted.lora_assigned_int_id
        self._oai_models.lora_requests[wanted.model_id] = SimpleNamespace(lora_int_id=number)
        self.held.add(number)

    async def remove_lora(self, number: int) -> None:
        self.held.discard(number)


@pytest.fixture
def store(llama: Path, tmp_path: Path) -> AdapterStore:
    made = AdapterStore(tmp_path / "state", base_shapes(llama), max_adapters=4, max_rank=8, beta=0.1)
    made.begin([])
    return made


@pytest.fixture
def entries(store: AdapterStore, llama: Path, tmp_path: Path) -> list[Listed]:
    """`one` and `two`, prepared."""
    for seed, name in enumerate(("one", "two")):
        make_adapter(tmp_path / "adapters" / name, llama, seed=seed)
    return [store.prepare(name, name, [tmp_path / "adapters"]) for name in ("one", "two")]


def test_a_load_whose_client_left_is_counted(store: AdapterStore, entries: list[Listed]) -> None:
    """Else its weights would take the slot that must stay empty, and nobody would know."""

    async def scenario() -> None:
        engine = Engine()
        loaded = LoadedAdapters(engine, store, 4)
        store.add(entries[0])

        async def ask() -> None:
            async with loaded.held(entries[0]):
                pass

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0.005)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0.1)
        assert list(loaded._loaded) == ["one"]
        assert len(engine.held) == 1
        store.remove("one")
        await loaded.forget()
        assert engine.held == set()

    asyncio.run(scenario())


def test_what_is_begun_is_ended_whoever_leaves() -> None:
    async def scenario() -> list[str]:
        done: list[str] = []

        async def change() -> None:
            await asyncio.sleep(0.02)
            done.append("changed")

        waiting = asyncio.create_task(finished(change()))
        await asyncio.sleep(0.005)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0.05)
        return done

    assert asyncio.run(scenario()) == ["changed"]


def test_a_name_that_was_taken_meanwhile_is_refused(store: AdapterStore, entries: list[Listed]) -> None:
    async def scenario() -> None:
        loaded = LoadedAdapters(Engine(), store, 4)
        store.add(entries[0])
        other = Listed("one", entries[1].folder, 4, 0.1, "")
        with pytest.raises(AdapterError, match="there is an adapter `one` already"):
            await loaded.try_out(other)
        assert loaded._loaded == {}

    asyncio.run(scenario())


def test_adapters_that_cannot_be_had_keep_no_replica_from_starting(store: AdapterStore, entries: list[Listed]) -> None:
    async def scenario() -> None:
        loaded = LoadedAdapters(Engine(), store, 4)
        for entry in entries:
            store.add(entry)
        shutil.rmtree(entries[0].folder)
        await loaded.load_listed()
        assert list(loaded._loaded) == ["two"]
        with pytest.raises(AdapterError, match="the engine does not take it"):
            async with loaded.held(entries[0]):
                pass
        store.remove("one")
        with pytest.raises(AdapterError) as gone:  # asked for just before it was removed
            async with loaded.held(entries[0]):
                pass
        assert gone.value.status == 404

    asyncio.run(scenario())
