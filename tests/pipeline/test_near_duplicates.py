"""Instructions that are nearly alike: listed, warned about where they leak, left out on request."""

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jpo_ray import records
from jpo_ray.cluster import embedding, tiles
from jpo_ray.config import RunConfig
from pipeline.inline import Cluster, install, run, small_config

TEXTS = {
    "train": ["Name a fruit.", "NAME A FRUIT.", "Count to ten.", "Say hello.", "Sing."],
    "validation": ["say HELLO.", "Jump."],
    "test": ["count TO ten.", "Run."],
}


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """An encoder to which texts that differ in case alone are nearly the same."""
    found = install(monkeypatch)

    def embed_texts(_ray: Any, _cluster: Any, _config: Any, texts: dict[str, str], _bar: Any) -> embedding.Embedded:
        seeds = [list(hashlib.sha256(text.lower().encode()).digest()) for text in texts.values()]
        own = [list(hashlib.sha256(text.encode()).digest()) for text in texts.values()]
        vectors = np.stack([_normal(seed) + 0.05 * _normal(other) for seed, other in zip(seeds, own, strict=True)])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return embedding.Embedded(vectors.astype(np.float16), cached=0, truncated=0)

    monkeypatch.setattr(embedding, "embed_texts", embed_texts)
    return found


def _normal(seed: list[int]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=64)


def config_for(folder: Path, **items: Any) -> RunConfig:
    sources: dict[str, Any] = {}
    for split, texts in TEXTS.items():
        rows = [{"prompt": text, "chosen": f"good {i}", "rejected": f"bad {i}"} for i, text in enumerate(texts)]
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[split] = [{"path": str(path)}]
    return small_config(items=sources | items, judge={"annotator": "labels"}, pairs={"joint": None})


def instructions(run_dir: Path, split: str) -> set[str]:
    rows = records.read_table(run_dir / "items" / "items.parquet", records.ITEMS).to_pylist()
    return {row["instruction"] for row in rows if row["split"] == split}


def test_they_are_listed_and_leaks_are_warned_about(tmp_path: Path) -> None:
    shown = run(config_for(tmp_path), tmp_path / "run", ["items", "pairs"])
    assert "near-duplicate pairs 3, instructions that leak 2" in shown
    assert "2 train or validation instructions are near-duplicates (cosine 0.95 or more)" in shown
    rows = records.read_table(tmp_path / "run" / "embeddings" / "near_duplicates.parquet", records.NEAR_DUPLICATES)
    text = {records.instruction_id(text): text for texts in TEXTS.values() for text in texts}
    found = {(text[row["instruction_a"]], text[row["instruction_b"]], row["leaks"]) for row in rows.to_pylist()}
    within = {pair for pair in found if not pair[2]}
    assert found - within == {("Say hello.", "say HELLO.", True), ("Count to ten.", "count TO ten.", True)}
    assert {frozenset(pair[:2]) for pair in within} == {frozenset(("Name a fruit.", "NAME A FRUIT."))}


def test_every_copy_of_a_test_instruction_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty copies in training, which are nearer to one another than to it or as near."""
    copies = ["".join(c.upper() if n >> i & 1 else c for i, c in enumerate("count to ten.")) for n in range(1, 80, 2)]
    monkeypatch.setitem(TEXTS, "train", list(dict.fromkeys([*copies, "Sing.", "Dance."])))
    shown = run(config_for(tmp_path, drop_near_duplicates=True), tmp_path / "run", ["items", "pairs"])
    assert instructions(tmp_path / "run", "train") == {"Sing.", "Dance."}
    assert "instructions that leak" not in shown


def test_those_that_leak_are_left_out_on_request(tmp_path: Path) -> None:
    shown = run(config_for(tmp_path, drop_near_duplicates=True), tmp_path / "run", ["items", "pairs"])
    assert "near duplicates 2" in shown
    assert "instructions that leak" not in shown  # a zero is not shown
    assert instructions(tmp_path / "run", "train") == {"Name a fruit.", "NAME A FRUIT.", "Sing."}
    assert instructions(tmp_path / "run", "validation") == set(TEXTS["validation"])
    assert instructions(tmp_path / "run", "test") == set(TEXTS["test"])


def test_a_search_for_them_that_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any) -> Iterator[tuple[int, bytes]]:
        time.sleep(2)
        yield 0, b""

    monkeypatch.setattr(tiles, "_tasks_on_ray", silent)
    config = config_for(tmp_path)
    hasty = config.model_copy(update={"cluster": config.cluster.model_copy(update={"actor_timeout_s": 0.2})})
    with pytest.raises(TimeoutError, match=r"^pairs: nothing came for 0\.2 s \(cluster\.actor_timeout_s\)"):
        run(hasty, tmp_path / "run", ["items", "pairs"])
