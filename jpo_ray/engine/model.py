"""Loading models and tokenizers: safetensors only, LoRA through peft, 4-bit through bitsandbytes."""

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jpo_ray.config import BaseModelConfig
from jpo_ray.config_training import TrainConfig
from jpo_ray.errors import InputError
from jpo_ray.files import hash_file, read_json, write_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]  # never pickles


def resolve_model(name_or_path: str, key: str = "model.model_name_or_path") -> Path:
    """Folder of a model: a local one as it is, a Hugging Face id downloaded to the hub's cache.

    Raises `InputError`, naming the config's `key`, where it does not exist or holds no safetensors.
    """
    folder = model_folder(name_or_path, key)
    if not (folder / "config.json").exists():
        raise InputError(f"{key}: {folder}: holds no config.json; name the folder of a model")
    _check_weights(folder, key)
    return folder


def model_folder(name_or_path: str, key: str) -> Path:
    """`resolve_model` without a look at what the folder holds."""
    folder = Path(name_or_path).expanduser()
    if folder.exists():
        return folder
    if name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1:
        raise InputError(f"{key}: {name_or_path}: no such folder")
    return _download(name_or_path, key)


def _check_weights(folder: Path, key: str) -> None:
    """Raise `InputError` unless the folder holds a whole model as safetensors (their headers are read)."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.exists() else {"model.safetensors"}
    for name in sorted(names):
        if not (folder / name).exists():
            raise InputError(
                f"{key}: {folder}: no {name}; pickled weights are not loaded, convert them "
                "(`model.save_pretrained(folder, safe_serialization=True)` where you trust them), and an adapter "
                "alone is not a model"
            )
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{key}: {folder / name}: cannot be read ({error})") from error


def _download(repo_id: str, key: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=MODEL_FILES))
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(
            f"{key}: {repo_id}: neither a folder nor to be had from the Hugging Face Hub ({reason})"
        ) from error


def load_tokenizer(folder: Path, *, generates: bool = True) -> Any:
    """Raises `InputError` where there is none, or none that can end a response (if the model `generates`)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"{folder}: holds no tokenizer that can be loaded ({reason})") from error
    if generates and tokenizer.eos_token_id is None:
        raise InputError(f"{folder}: the tokenizer has no EOS token; a response could never end")
    return tokenizer


def load_model(folder: Path, *, dtype: str, load_in_4bit: bool = False, device: str = "cpu") -> Any:
    """A causal language model in evaluation mode. `dtype` is the compute dtype where the weights are 4-bit."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(folder)
    _disable_attention_dropout(config)
    options: dict[str, Any] = {"config": config}
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # transformers' other kinds leave the cap out without a word (Gemma 2)
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=DTYPES[dtype], use_safetensors=True, device_map=device, **options
    )
    _keep_backward(model)
    return model.eval()


def _keep_backward(model: Any) -> None:
    """On CPUs with AVX512-BF16 the first evaluation would repack bitsandbytes layers for inference alone: rounded to
    bfloat16, and without a backward pass, so that later training would go wrong in silence.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _disable_attention_dropout(config: Any) -> None:
    """Attention dropout acts inside fused kernels, where masks cannot be keyed by item; training does without it.

    In the config, before the model is built: some architectures read it once, into a layer of their own.
    """
    for part in (config, config.get_text_config()):
        for name in ("attention_dropout", "attn_pdrop"):
            if hasattr(part, name):
                setattr(part, name, 0.0)


def load_policy(folder: Path, model: BaseModelConfig, train: TrainConfig, *, seed: int, device: str = "cpu") -> Any:
    """The model to train: LoRA adapters on frozen (perhaps 4-bit) weights, or all parameters in float32; fresh, or as
    `train.continue_from` left them.
    """
    if not train.use_peft:
        return load_model(Path(train.continue_from or folder), dtype="float32", device=device)
    base = load_model(folder, dtype=model.dtype, load_in_4bit=model.load_in_4bit, device=device)
    return add_lora(base, train, seed=seed) if train.continue_from is None else _trained_lora(base, train)


def _trained_lora(base: Any, train: TrainConfig) -> Any:
    """The adapter that training goes on from; its rank, targets and dropout are its own."""
    from peft import PeftModel

    assert train.continue_from is not None
    with ranks_of_experts():
        return PeftModel.from_pretrained(base, train.continue_from, is_trainable=True, use_safetensors=True)


@contextmanager
def ranks_of_experts() -> Iterator[None]:
    """Without peft's warning of ranks that it sets itself, for stacked experts, and looks for among modules."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        yield


def add_lora(base: Any, train: TrainConfig, *, seed: int) -> Any:
    """Fresh LoRA adapters on `base`, whose initial values depend on `seed` alone. Raises `InputError` where they cannot
    be put where `train.lora_target_modules` says.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(seed)
    targets = train.lora_target_modules
    if targets == "all-linear" and any("experts" in name for name, _ in base.named_parameters()):
        targets = _beside_experts(base)
    lora = LoraConfig(
        r=train.lora_r,
        lora_alpha=train.lora_alpha,
        lora_dropout=train.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),  # GPT-2's transposed weights
    )
    try:
        with ranks_of_experts():
            return get_peft_model(base, lora)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        if "lora_dropout" in reason:
            reason = "LoRA on experts takes no dropout; set lora_dropout: 0, or name other modules"
        raise InputError(f"train.{train.name}.lora_target_modules: {reason}") from error


# What the layers of experts and their routers are called; peft takes these names for the experts' stacked weights too.
OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def _beside_experts(base: Any) -> list[str]:
    """Names of a mixture of experts' linear layers other than its experts': those of attention."""
    head = base.get_output_embeddings()
    linear = {name for name, module in base.named_modules() if isinstance(module, nn.Linear) and module is not head}
    return sorted({name.rsplit(".", 1)[-1] for name in linear} - OF_EXPERTS)


def backbone_and_head(model: Any) -> tuple[nn.Module, nn.Module]:
    """The part that gives hidden states and the projection to the vocabulary."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.get_decoder(), causal.get_output_embeddings()


TOKENIZER_FILES = ("tokenizer*", "*.model", "*.jinja", "vocab*", "merges.txt", "special_tokens_map.json")


def model_hash(folder: Path, cache: Path | None = None) -> str:
    """Hash of weights, config and tokenizer files: all that a stage which starts from the model depends on."""
    files = sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})
    parts = [weights_hash(folder, cache), *(f"{path.name}:{hash_file(path)}" for path in files)]
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def weights_hash(folder: Path, cache: Path | None = None) -> str:
    """Hash of all weights and the model's config. With `cache` (a folder) file hashes are remembered by size and time,
    so that a checkpoint of many gigabytes is read once.
    """
    known_path = cache / "file_hashes.json" if cache else None
    known = read_json(known_path) if known_path and known_path.exists() else {}
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in known:
            known[key] = hash_file(path)
        if path.suffix == ".json":
            content = read_json(path)
            content.pop("transformers_version", None)
            content.pop("_name_or_path", None)
            digest.update(json.dumps(content, sort_keys=True).encode())
        else:
            digest.update(f"{path.name}:{known[key]}".encode())
    if known_path:
        known_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(known_path, known)
    return digest.hexdigest()[:16]
