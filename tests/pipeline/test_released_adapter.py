"""The authors' aligned adapters, folders of one repository: what docs/recipes.md says to do with them works on such."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from jpo_ray import records
from jpo_ray.config import RunConfig
from jpo_ray.config_file import apply_override, load_config, parse_config
from jpo_ray.config_serve import load_serve_config
from jpo_ray.engine.adapters import load_adapter
from jpo_ray.engine.model import load_model
from jpo_ray.files import read_json, write_json
from jpo_ray.sandbox import BASE_MODEL
from jpo_ray.serving.adapter_checks import base_shapes, check_adapter
from jpo_ray.serving.models import find_models
from pipeline.inline import JPO, Cluster, run, small_config

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "helpful_released.yaml"
(BLOCK,) = [
    block
    for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "recipes.md").read_text(), re.M | re.S)
    if "dove_checkpoints" in block
]
COMMANDS = [shlex.split(line) for line in BLOCK.splitlines()]
STAGES = {command[1]: command[6:] for command in COMMANDS if command[0] == "jpo" and command[1] != "serve"}


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the first command leaves in the current folder: an adapter below its parent, of peft's two files, whose
    config names more modules than the model has, as the authors' do.
    """
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    lora = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(Path(BASE_MODEL), dtype="float32"), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape)
    where = dict(zip(COMMANDS[0], COMMANDS[0][1:], strict=False))
    folder = Path(where["--local-dir"]) / where["--include"].removesuffix("/*")
    model.save_pretrained(folder)
    config = folder / "adapter_config.json"
    more = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out", "wte"]
    write_json(config, read_json(config) | {"target_modules": more})
    return folder


def with_keys(overrides: list[str], **sections: object) -> RunConfig:
    values = small_config(**sections).model_dump(mode="json")
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, "test")


def test_the_commands_are_of_one_recipe_and_one_folder() -> None:
    assert COMMANDS[0][:3] == ["hf", "download", "jointpreferences/dove_checkpoints"]
    assert [command[1] for command in COMMANDS[1:]] == ["items", "sft", "sample", "serve"]
    for overrides in STAGES.values():
        config = load_config(RECIPE, overrides)
        assert (config.model.model_name_or_path, config.sft) == ("models/dove/helpful_dove", None)
        assert config.sample is not None
        assert config.sample.models == ["sft"]


def test_an_adapter_below_a_folder_is_sampled(downloaded: Path, cluster: Cluster) -> None:
    """Greedily it answers as the adapter on its base does, and not as the base."""
    sample = {"engine": "transformers", "temperatures": [0.0], "max_new_tokens": 16}
    for stage, overrides in STAGES.items():
        run(with_keys(overrides, sft=None, sample=sample), "runs/dove", [stage])
    assert cluster.calls == ["sample 6 with transformers"]
    rows = records.read_table(Path("runs/dove/sample/samples.parquet"), records.SAMPLES).to_pylist()
    assert {row["model"] for row in rows} == {"sft"}
    ids = torch.tensor([[1, 40, 41, 42, 43]])
    merged = load_model(Path("runs/dove/base"), dtype="float32")(ids).logits
    stacked = load_adapter(downloaded, Path(BASE_MODEL), dtype="float32")(ids).logits
    bare = load_model(Path(BASE_MODEL), dtype="float32")(ids).logits
    assert (merged - stacked).abs().max() < 1e-3
    assert (merged - bare).abs().max() > 0.1


@pytest.mark.usefixtures("cluster")
def test_an_adapter_below_a_folder_is_served_beside_a_runs_own(downloaded: Path) -> None:
    """On the base that both were trained on: nothing is warned of, and every check of an adapter's files passes."""
    command = COMMANDS[-1]
    run_dir, overrides = Path(command[command.index("--run-dir") + 1]), command[4:]
    run(small_config(sft=None, train=[JPO], sample=None, evaluate=None), run_dir)
    offer = find_models(load_serve_config(None, overrides, run_dir))
    assert [(entry.name, entry.folder) for entry in offer.adapters][1:] == [("helpful_dove", downloaded)]
    assert (offer.adapters[0].name, offer.base, offer.warnings) == ("jpo", Path(BASE_MODEL).resolve(), [])
    assert check_adapter(downloaded, base_shapes(offer.base), max_rank=8) == 8
