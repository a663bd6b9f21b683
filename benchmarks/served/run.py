"""The run that is served: a Llama of 19 million parameters with random weights, and four adapters on it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sampling import make_model

from jpo_ray.config_training import TrainConfig
from jpo_ray.files import write_json
from jpo_ray.runs import RunDir

ADAPTERS = ("one", "two", "three", "four")


def make_run(folder: Path) -> Path:
    """A run directory with the model as `sft` and four adapters."""
    model = make_model(folder)
    run = RunDir(folder / "run")
    (folder / "run").mkdir()
    section = {"max_length": 512, "dtype": "float32"}

    def copied(out: Path) -> dict[str, Any]:
        shutil.copytree(model.path, out, dirs_exist_ok=True)
        return {}

    sft, _ = run.build("sft", inputs={}, config={"model": section}, make=copied)
    for number, name in enumerate(ADAPTERS):
        config = {"model": section, "train": TrainConfig(name=name).model_dump()}
        make = adapter_maker(run.path("sft"), number)
        run.build(f"train/{name}", inputs={"sft": sft.fingerprint}, config=config, make=make)
    write_json(folder / "run" / "run.json", {"format": 1})
    return folder / "run"


def adapter_maker(base: Path, seed: int) -> Callable[[Path], dict[str, Any]]:
    def make(out: Path) -> dict[str, Any]:
        import torch

        from jpo_ray.engine.model import add_lora, load_model

        adapter = add_lora(load_model(base, dtype="float32"), TrainConfig(name="x"), seed=seed)
        with torch.no_grad():
            for key, weight in adapter.named_parameters():
                if "lora_B" in key:
                    weight.copy_(0.02 * torch.randn(weight.shape))
        adapter.save_pretrained(out)
        return {}

    return make
