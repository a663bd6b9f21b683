"""A run directory with the sandbox's model as its SFT model and adapters whose random weights change what it says."""

import shutil
from pathlib import Path
from typing import Any

import torch

from jpo_ray.config_training import TrainConfig
from jpo_ray.data.tokens import Layout
from jpo_ray.engine.model import add_lora, load_model
from jpo_ray.files import write_json
from jpo_ray.runs import RunDir
from jpo_ray.sandbox import BASE_MODEL

LAYOUT = Layout("### Instructions: {instruction}\n\n### Response:", " ", 256)
MODEL = {"template": LAYOUT.template, "response_prefix": " ", "max_length": 256, "dtype": "float32"}
BETAS = {"jpo": 0.5, "dpo.one": 0.2}
RANKS = {"jpo": 4, "dpo.one": 8}


def make_run(root: Path, *, base: Path = BASE_MODEL, betas: dict[str, float] | None = None) -> Path:
    """`sft` and one adapter per name, as the stages leave them."""
    run = RunDir(root)
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "run.json", {"format": 1})

    def copy(out: Path) -> dict[str, Any]:
        shutil.copytree(base, out, dirs_exist_ok=True)
        return {}

    sft, _ = run.build("sft", inputs={}, config={"model": MODEL}, make=copy)
    for number, (name, beta) in enumerate((betas or BETAS).items()):
        config = {"model": {**MODEL, "load_in_4bit": False}, "train": TrainConfig(name=name, beta=beta).model_dump()}

        def make(out: Path, number: int = number, name: str = name) -> dict[str, Any]:
            make_adapter(out, run.path("sft"), seed=number, rank=RANKS.get(name, 4))
            return {}

        run.build(f"train/{name}", inputs={"sft": sft.fingerprint}, config=config, make=make)
    return root


def make_adapter(out: Path, base: Path, *, seed: int, rank: int = 4, size: float = 0.3, **more: Any) -> Path:
    """An adapter of random weights, the more of another mind the larger `size`."""
    train = TrainConfig(name="any", lora_r=rank, lora_alpha=2 * rank, **more)
    adapter = add_lora(load_model(base, dtype="float32"), train, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in adapter.named_parameters():
            if "lora_B" in key:
                weight.copy_(size * torch.randn(weight.shape, generator=generator))
    adapter.save_pretrained(out, save_embedding_layers=False)
    return out
