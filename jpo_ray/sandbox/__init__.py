"""The sandbox: an embedded world in which the quality of any response can be computed.

Instructions of several families, responses of graded quality, an oracle that scores any text, and a tiny pretrained
language model: everything that the demo and the tests need, without download, key or GPU. Importing this package
imports neither torch nor transformers.
"""

from pathlib import Path

from jpo_ray.sandbox.oracle import quality
from jpo_ray.sandbox.rows import make_rows

BASE_MODEL = Path(__file__).parent / "base_model"
"""Folder of the pretrained base model that ships with the package: config, safetensors and tokenizer."""

__all__ = ["BASE_MODEL", "make_rows", "quality"]
