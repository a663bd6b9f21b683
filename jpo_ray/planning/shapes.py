"""A model's parameters without its weights: the names and shapes of its tensors.

They are read from the headers of its safetensors where these are on this machine, else made from its `config.json`,
else from a table of models that recipes name. Neither torch nor transformers is loaded.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jpo_ray.config import SANDBOX, TINY
from jpo_ray.files import read_json

Shapes = dict[str, tuple[int, ...]]

# Dense models of one layout: attention of four projections, a gated MLP of three, and norms.
LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3", "gemma"}
_EMBEDDINGS = ("embed", "wte", "wpe", "lm_head")
_EXPERTS = (".experts.", ".gate.", ".router.")  # which LoRA on all linear layers leaves alone
ADAPTER = "adapter_config.json"


def _known(kind: str, hidden: int, inner: int, layers: int, heads: int, key_value_heads: int, vocabulary: int,
           **more: Any) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "vocab_size": vocabulary, **more,
    }  # fmt: skip


_MISTRAL = _known("mistral", 4096, 14336, 32, 32, 8, 32000)
_QWEN3 = _known("qwen3", 1024, 3072, 28, 16, 8, 151936, head_dim=128, tie_word_embeddings=True)
# By their published config.json; of ASSUMED, their base's: they are taken to have its shapes.
KNOWN: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": _MISTRAL,
    "alignment-handbook/zephyr-7b-sft-full": _MISTRAL,
    "jointpreferences/mistral_7b_lr_1.5e-6_sft": _MISTRAL,
    "jointpreferences/mistral_7b_sft_helpful": _MISTRAL,
    "HuggingFaceTB/SmolLM2-135M": _known("llama", 576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "HuggingFaceTB/SmolLM2-360M": _known("llama", 960, 2560, 32, 15, 5, 49152, tie_word_embeddings=True),
    "Qwen/Qwen2.5-0.5B": _known("qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
    "Qwen/Qwen3-0.6B-Base": _QWEN3,
    "Qwen/Qwen3-0.6B": _QWEN3,
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": _QWEN3,
}
ASSUMED = {
    "jointpreferences/mistral_7b_lr_1.5e-6_sft": "mistralai/Mistral-7B-v0.1",
    "jointpreferences/mistral_7b_sft_helpful": "mistralai/Mistral-7B-v0.1",
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": "Qwen/Qwen3-0.6B",
}


@dataclass(frozen=True)
class ModelShapes:
    tensors: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any]  # of the text model
    origin: str  # where the shapes come from, for people

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.tensors.values()))

    @property
    def projections(self) -> dict[str, tuple[int, ...]]:
        """The weights of linear layers, without embeddings and head: what LoRA and 4-bit loading take."""
        return {
            name: shape
            for name, shape in self.tensors.items()
            if len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in _EMBEDDINGS)
        }

    @property
    def tied(self) -> bool:
        return not any("lm_head" in name for name in self.tensors)

    @property
    def width(self) -> int:
        return int(self.config.get("hidden_size") or self.config.get("n_embd") or 0)

    @property
    def inner_width(self) -> int:
        """Of the MLP, all experts that a token uses."""
        inner = self.config.get("intermediate_size") or self.config.get("n_inner") or 4 * self.width
        return int(inner) * int(self.config.get("num_experts_per_tok") or 1)

    @property
    def key_value_width(self) -> int:
        heads = int(self.config.get("num_attention_heads") or self.config.get("n_head") or 1)
        return int(self.config.get("head_dim") or self.width // heads) * int(
            self.config.get("num_key_value_heads") or heads
        )

    @property
    def layers(self) -> int:
        return int(self.config.get("num_hidden_layers") or self.config.get("n_layer") or 0)

    def adapted(self, targets: Sequence[str] | str) -> dict[str, tuple[int, ...]]:
        """The projections that LoRA is put on."""
        if isinstance(targets, str):  # all-linear
            found = self.projections
            return {name: shape for name, shape in found.items() if not any(part in name for part in _EXPERTS)}
        return {name: shape for name, shape in self.projections.items() if name.split(".")[-2] in targets}

    def lora_parameters(self, targets: Sequence[str] | str, rank: int) -> int:
        return sum(rank * (into + out) for into, out in self.adapted(targets).values())

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with: its experts only, and input embeddings only where tied."""
        experts = self.config.get("num_local_experts") or self.config.get("num_experts")
        share = (self.config.get("num_experts_per_tok") or 1) / experts if experts else 1.0
        looked_up = ("embed", "wpe") if not self.tied else ("wpe",)
        return int(
            sum(
                math.prod(shape) * (share if ".experts." in name else 1.0)
                for name, shape in self.tensors.items()
                if not any(part in name for part in looked_up)
            )
        )


def is_hub_id(name: str) -> bool:
    """Whether the name of a model that is no folder here is one of the Hub."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def model_folder(name: str) -> Path | None:
    """The folder of a model that is on this machine, also in the Hub's cache; None where it is not."""
    if name in (SANDBOX, TINY):  # `tiny` is made with the sandbox's shapes
        from jpo_ray.sandbox import BASE_MODEL

        return BASE_MODEL
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(name, file) for file in ("config.json", ADAPTER))
    return next((Path(path).parent for path in found if isinstance(path, str)), None)


def base_name(name: str) -> str:
    """The model that an adapter on this machine belongs on, which it will be merged into; else the name itself."""
    folder = model_folder(name)
    if folder is None or (folder / "config.json").exists() or not (folder / ADAPTER).exists():
        return name
    return str(read_json(folder / ADAPTER).get("base_model_name_or_path") or name)


def model_shapes(name: str) -> ModelShapes | str:
    """The model's shapes, or why they are not known."""
    folder = model_folder(name)
    if folder is None or not (folder / "config.json").exists():
        if name not in KNOWN:
            return f"{name} is not on this machine, and its size is not known here"
        how = f"taken to be as large as {ASSUMED[name]}" if name in ASSUMED else "by its published config"
        return ModelShapes(shapes_of_config(KNOWN[name]) or {}, KNOWN[name], how)
    config = read_json(folder / "config.json")
    config = config.get("text_config") or config
    if weights := weight_files(folder):
        return ModelShapes(dict(_headers(weights)), config, "by its weights' headers")
    shapes = shapes_of_config(config)
    if shapes is None:
        return (
            f"{name}: its weights are not on this machine, and `{config.get('model_type')}` cannot be counted by config"
        )
    return ModelShapes(shapes, config, "by its config.json")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a whole model; none where one is missing."""
    index = folder / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    files = [folder / name for name in sorted(names)]
    return files if all(file.exists() for file in files) else []


def _headers(files: Sequence[Path]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor: a safetensors file begins with the length of a JSON header, and the header."""
    for path in files:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        yield from ((name, tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__")


def shapes_of_config(config: Mapping[str, Any]) -> Shapes | None:
    """The tensors of a dense model in Llama's layout, or GPT-2; None for others."""
    if config.get("model_type") == "gpt2":
        return _gpt2(config)
    if config.get("model_type") not in LLAMA_LIKE:
        return None
    hidden, inner, heads = (int(config[key]) for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    head = int(config.get("head_dim") or hidden // heads)
    query, key_value = head * heads, head * int(config.get("num_key_value_heads") or heads)
    kind = config["model_type"]
    layer: Shapes = {
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if kind == "qwen2":
        layer |= {f"self_attn.{name}_proj.bias": (query if name == "q" else key_value,) for name in "qkv"}
    if kind == "qwen3":
        layer |= {f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
    found = _stacked("model.layers", int(config["num_hidden_layers"]), layer)
    found |= {"model.embed_tokens.weight": (int(config["vocab_size"]), hidden), "model.norm.weight": (hidden,)}
    tied = config.get("tie_word_embeddings", kind == "gemma")
    return found if tied else found | {"lm_head.weight": (int(config["vocab_size"]), hidden)}


def _gpt2(config: Mapping[str, Any]) -> Shapes:
    width = int(config["n_embd"])
    inner = int(config.get("n_inner") or 4 * width)
    layer: Shapes = {"ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,)}
    for name, into, out in (
        ("attn.c_attn", width, 3 * width), ("attn.c_proj", width, width),
        ("mlp.c_fc", width, inner), ("mlp.c_proj", inner, width),
    ):  # fmt: skip
        layer |= {f"{name}.weight": (into, out), f"{name}.bias": (out,)}
    found = _stacked("transformer.h", int(config["n_layer"]), layer)
    return found | {
        "transformer.wte.weight": (int(config["vocab_size"]), width),
        "transformer.wpe.weight": (int(config["n_positions"]), width),
        "transformer.ln_f.weight": (width,),
        "transformer.ln_f.bias": (width,),
    }


def _stacked(prefix: str, layers: int, layer: Shapes) -> Shapes:
    return {f"{prefix}.{number}.{name}": shape for number in range(layers) for name, shape in layer.items()}
