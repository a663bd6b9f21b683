"""What a run offers to be served, and what is odd about it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jpo_ray.config_serve import ServeConfig, load_serve_config
from jpo_ray.engine.adapters import record_base
from jpo_ray.engine.model import weights_hash
from jpo_ray.errors import InputError
from jpo_ray.files import read_json, write_json
from jpo_ray.serving.keys import KEYS_VARIABLE, read_keys, require_keys
from jpo_ray.serving.models import find_models
from serving.served_run import LAYOUT, make_run

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "serve").glob("*.yaml"))


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run", base=llama)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def change_manifest(folder: Path, **config: Any) -> None:
    manifest = read_json(folder / "manifest.json")
    manifest["config"]["model"] |= config
    write_json(folder / "manifest.json", manifest)


def offered(run: Path, **config: Any) -> Any:
    return find_models(ServeConfig(run_dir=str(run), **config))


def test_a_run_offers_its_models(run: Path) -> None:
    offer = offered(run)
    assert (offer.base, offer.layout, offer.dtype) == ((run / "sft").resolve(), LAYOUT, "float32")
    assert [(entry.name, entry.beta) for entry in offer.adapters] == [("dpo.one", 0.2), ("jpo", 0.5)]
    assert (offer.full, offer.warnings) == ([], [])
    assert [entry.name for entry in offered(run, models=["sft", "jpo"]).adapters] == ["jpo"]


def test_whole_models_are_told_from_adapters(run: Path, llama: Path) -> None:
    shutil.copytree(run / "train" / "jpo", run / "train" / "full")
    for path in (run / "train" / "full").glob("adapter*"):
        path.unlink()
    shutil.copytree(llama, run / "train" / "full", dirs_exist_ok=True)
    manifest = read_json(run / "train" / "full" / "manifest.json")
    write_json(run / "train" / "full" / "manifest.json", manifest | {"files": {}})
    offer = offered(run)
    assert [entry.name for entry in offer.full] == ["full"]
    assert [entry.name for entry in offer.adapters] == ["dpo.one", "jpo"]


def test_a_run_without_sft_is_served_on_the_base_of_its_adapters(run: Path, llama: Path) -> None:
    shutil.rmtree(run / "sft")
    config = run / "train" / "jpo" / "adapter_config.json"
    write_json(config, read_json(config) | {"base_model_name_or_path": str(llama)})
    assert offered(run, models=["jpo"]).base == llama.resolve()


def test_odd_models_are_warned_of(run: Path, tmp_path: Path) -> None:
    change_manifest(run / "train" / "jpo", load_in_4bit=True)
    manifest = read_json(run / "train" / "dpo.one" / "manifest.json")
    write_json(run / "train" / "dpo.one" / "manifest.json", manifest | {"inputs": {"sft": "another"}})
    elsewhere = shutil.copytree(run / "train" / "jpo", tmp_path / "elsewhere")
    config = read_json(elsewhere / "adapter_config.json")
    write_json(elsewhere / "adapter_config.json", config | {"base_model_name_or_path": "some/model"})
    warnings = offered(run, adapters={"mine": str(elsewhere)}).warnings
    assert [warning.split(":")[0].split(" (")[0] for warning in warnings] == [
        "dpo.one was trained on another SFT model than the one that stands in the run now",
        "jpo was trained on a 4-bit base and is served on one in float32",
        "mine was trained on another base",
        "mine was trained on a 4-bit base and is served on one in float32",
    ]


def test_an_adapter_belongs_to_weights_wherever_they_lie(run: Path, tmp_path: Path) -> None:
    """The record that training leaves beside an adapter decides, not the path that peft writes into it."""
    elsewhere = shutil.copytree(run / "train" / "jpo", tmp_path / "elsewhere")
    (elsewhere / "manifest.json").unlink()
    config = read_json(elsewhere / "adapter_config.json")
    write_json(elsewhere / "adapter_config.json", config | {"base_model_name_or_path": "/moved/run/sft"})

    def warned() -> list[str]:
        return offered(run, adapters={"mine": str(elsewhere)}).warnings

    assert len(warned()) == 1
    record_base(elsewhere, Path("/moved/run/sft"), weights_hash(run / "sft"), load_in_4bit=False)
    assert warned() == []
    record_base(elsewhere, Path("/moved/run/sft"), weights_hash(run / "sft"), load_in_4bit=True)
    assert warned() == ["mine was trained on a 4-bit base and is served on one in float32: its answers differ a little"]
    record_base(elsewhere, run / "sft", "0123456789abcdef", load_in_4bit=False)  # trained again in place
    assert [warning.split(" (")[0] for warning in warned()] == ["mine was trained on another base"]
    write_json(elsewhere / "base_model.json", {"model": 1})
    assert warned() == ["mine: what base it was trained on cannot be told from its folder"]


def test_whole_models_from_elsewhere(run: Path, llama: Path, gpt2: Path, tmp_path: Path) -> None:
    merged = shutil.copytree(llama, tmp_path / "merged")
    [entry] = offered(run, whole_models={"merged": str(merged)}).full
    assert (entry.name, entry.folder, entry.beta) == ("merged", merged, None)
    for file in merged.glob("tokenizer*"):
        file.unlink()
    assert [entry.name for entry in offered(run, whole_models={"merged": str(merged)}).full] == ["merged"]
    config = read_json(merged / "config.json")
    write_json(merged / "config.json", config | {"vocab_size": config["vocab_size"] + 1})
    with pytest.raises(
        InputError, match=r"whole_models.merged: .* has no tokenizer and a vocabulary of \d+ tokens; that"
    ):
        offered(run, whole_models={"merged": str(merged)})
    with pytest.raises(InputError, match=r"whole_models.other: .* has another tokenizer than"):
        offered(run, whole_models={"other": str(gpt2)})
    with pytest.raises(InputError, match=r"whole_models.gone: .*: no such folder"):
        offered(run, whole_models={"gone": str(tmp_path / "gone")})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"whole_models": {"jpo": "x"}}, r"whole_models.jpo: the run has a model of that name"),
        ({"models": ["gone"]}, r"models: .* has no model `gone`; there are sft, dpo.one, jpo"),
        ({"adapters": {"jpo": "x"}}, r"adapters.jpo: the run has a model of that name"),
    ],
)
def test_models_that_are_not_there(run: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        offered(run, **config)


def test_runs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        offered(tmp_path / "gone")
    with pytest.raises(InputError, match="no `sft` yet; run `jpo sft` first"):
        offered(tmp_path)
    with pytest.raises(InputError, match="name the run"):
        find_models(ServeConfig())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prot=1", "unknown key `prot`; did you mean `port`?"),
        ("port=70000", "`port`: .*less than 65536"),
        ("allowed_origins=['*']", "name the origins"),
        ("limits.max_n=0", "`limits.max_n`"),
        ("max_replicas=0", "`max_replicas`"),
        ("adapters={sft: x}", "the name `sft` is the SFT model's"),
        ("adapters={../x: x}", "`adapters"),
        ("whole_models={sft: x}", "the name `sft` is the SFT model's"),
        ("replicas=true", "replicas takes no true or false"),
    ],
)
def test_configs_that_are_none(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_serve_config(None, [override])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_parse(path: Path) -> None:
    config = load_serve_config(path, ["port=8123"])
    assert (config.port, bool(config.run_dir)) == (8123, True)


def test_there_are_shipped_configs() -> None:
    assert len(CONFIGS) >= 2


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, "sk-first-0123456789, sk-second-0123456789")
    file = tmp_path / "keys"
    file.write_text("sk-third-0123456789\n\n")
    keys = read_keys(ServeConfig(keys_file=str(file)))
    assert len(keys) == 3
    assert all(keys.opened_by(f"Bearer sk-{name}-0123456789".encode()) for name in ("first", "second", "third"))
    assert "sk-" not in repr(vars(keys))


@pytest.mark.parametrize("key", ["abc", "sk-first-0123456789,tiny", "schlüssel-0123456789"])
def test_weak_keys_are_refused_without_telling_them(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, key)
    with pytest.raises(InputError, match="shorter than 16 characters or not plain ASCII") as error:
        read_keys(ServeConfig())
    assert key.split(",")[-1] not in str(error.value)


def test_key_files_that_hold_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(InputError, match="holds no key"):
        read_keys(ServeConfig(keys_file=str(tmp_path / "empty")))
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(ServeConfig(keys_file=str(tmp_path / "gone")))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_no_listening_to_the_network_without_keys(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    with pytest.raises(InputError, match=f"host {host}: listens beyond this machine, which needs API keys"):
        require_keys(read_keys(ServeConfig()), "127.0.0.1", host)
    require_keys(read_keys(ServeConfig()), "127.0.0.1", "::1", "localhost")
    monkeypatch.setenv(KEYS_VARIABLE, "sk-first-0123456789")
    require_keys(read_keys(ServeConfig()), host)


def test_every_key_stands_in_the_reference_with_its_default() -> None:
    import yaml
    from pydantic import BaseModel

    written = yaml.safe_load((CONFIGS[0].parent / "reference.yaml").read_text())["applications"][0]["args"]

    def compare(values: dict[str, Any], section: type[BaseModel]) -> None:
        assert set(values) == set(section.model_fields)
        for name, field in section.model_fields.items():
            default = field.get_default(call_default_factory=True)
            if isinstance(default, BaseModel):
                compare(values[name], type(default))
            elif name != "run_dir":
                assert values[name] == default, name

    compare(written, ServeConfig)
    assert json.dumps(written)
