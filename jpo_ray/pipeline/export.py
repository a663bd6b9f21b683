"""`jpo export`: a model of a run in a folder of its own, for anything that loads models, and to be published."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from jpo_ray.artifacts import Manifest
from jpo_ray.engine.bases import base_of_adapter, hub_base, named_base
from jpo_ray.errors import InputError
from jpo_ray.files import read_json, write_json
from jpo_ray.pipeline.model_card import Exported, model_card
from jpo_ray.runs import RunDir

ADAPTER_CONFIG, BASE_RECORD = "adapter_config.json", "base_model.json"
ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", BASE_RECORD)
MODEL_PATTERNS = ("*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json")
SFT = "sft"


def export_model(
    run_dir: Path | str, name: str, out: Path, console: Console, *, adapter: bool = False, base: str | None = None
) -> None:
    """Write the model `name` of a run into the new folder `out`: weights, tokenizer, generation config, model card.

    An adapter is merged into its base, or with `adapter` exported as it is; `base` is then the name that it gives its
    base. Raises `InputError` for a model that is not there, a base that is another's, and an `out` that exists.
    """
    run = RunDir(run_dir)
    manifest, folder = _model_of(run, name)
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    if adapter and not is_adapter:
        raise InputError(f"--adapter: `{name}` is a whole model, not an adapter; leave the flag out")
    if base and not adapter:
        raise InputError("--base: is for an adapter that stays one; add --adapter")
    with _aside(out) as staged:
        facts: dict[str, Any] = {}
        if not is_adapter:
            _copy(folder, staged, MODEL_PATTERNS)
            _save_tokenizer(folder, staged)
        elif adapter:
            facts = _copy_adapter(run, manifest, folder, staged, base)
        else:
            facts = _merge(run, manifest, folder, staged)
        if not adapter:
            _end_at_eos(staged)
        kind = "adapter" if adapter else "model"
        card = model_card(Exported(run, name, manifest, kind, facts.get("base"), facts.get("note")))
        (staged / "README.md").write_text(card)
    for key in ("merged into", "note"):
        if facts.get(key):
            console.print(f"  {key} {facts[key]}", highlight=False, markup=False, soft_wrap=True)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors")) / 2**20
    console.print(f"{kind} {name}: {out} ({size:,.1f} MiB, README.md)", highlight=False, markup=False, soft_wrap=True)


def push_to_hub(out: Path, repo_id: str, console: Console, *, public: bool = False) -> None:
    """Send an exported folder to the Hugging Face Hub, as a private repository unless `public`.

    Raises `InputError` in one line where there is no token, no network or no right to write there.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi()
        api.create_repo(repo_id, private=not public, exist_ok=True)
        info = api.upload_folder(repo_id=repo_id, folder_path=out, commit_message="jpo export")
    except (HFValidationError, HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"--push-to-hub {repo_id}: not sent ({lines[0][:200]}); {out} is whole, so with a network and a token that "
            f"may write (`hf auth login` or HF_TOKEN) `hf upload {repo_id} {out}` sends it"
        ) from error
    console.print(f"sent: {info.commit_url.rsplit('/commit/', 1)[0]}", highlight=False, soft_wrap=True)


def require_token(repo_id: str) -> None:
    """Raise `InputError` before anything is exported where nothing could be sent afterwards."""
    from huggingface_hub import get_token

    if repo_id.count("/") != 1:
        raise InputError(f"--push-to-hub {repo_id}: a repository is named OWNER/NAME")
    if not get_token():
        raise InputError(f"--push-to-hub {repo_id}: no token for the Hub; run `hf auth login` or set HF_TOKEN")


def _model_of(run: RunDir, name: str) -> tuple[Manifest, Path]:
    if not run.root.is_dir():
        raise InputError(f"--run-dir {run.root}: no such folder")
    artifact = SFT if name == SFT else f"train/{name}"
    manifest = run.manifest(artifact)
    if manifest is None:
        folders = [each for each in run.trained() if run.manifest(f"train/{each}")]
        there = [*([SFT] if run.manifest(SFT) else []), *folders]
        raise InputError(f"--model {name}: {run.where} has no such model; there are {', '.join(there) or 'none yet'}")
    return manifest, run.path(artifact)


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and else is gone."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: exists already; name a new folder")
    staged = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        staged.mkdir(parents=True)
        yield staged
        if out.exists():
            out.rmdir()
        staged.rename(out)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _merge(run: RunDir, manifest: Manifest, folder: Path, staged: Path) -> dict[str, Any]:
    from jpo_ray.engine.merging import merge_adapter

    base = base_of_adapter(run, manifest, folder, "--model")
    return merge_adapter(folder, base, staged, str(manifest.config["model"]["dtype"]))


def _copy_adapter(run: RunDir, manifest: Manifest, folder: Path, staged: Path, base: str | None) -> dict[str, Any]:
    from jpo_ray.engine.merging import trained_on_4bit

    own = base_of_adapter(run, manifest, folder, "--model")
    _copy(folder, staged, ADAPTER_FILES)
    _save_tokenizer(folder, staged)
    base = base or hub_base(run, manifest)
    name = base or named_base(folder) or str(own)
    for file, key in ((ADAPTER_CONFIG, "base_model_name_or_path"), (BASE_RECORD, "model")):
        if (folder / file).exists():
            write_json(staged / file, read_json(folder / file) | {key: name})
    facts: dict[str, Any] = {"base": name}
    if base is None:
        facts["note"] = f"its base is {name}; publish that too and give its name with --base, for use elsewhere"
    if trained_on_4bit(folder):
        facts["note"] = " ".join([facts.get("note", ""), "It was trained on 4-bit weights."]).strip()
    return facts


def _copy(folder: Path, staged: Path, patterns: tuple[str, ...]) -> None:
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        shutil.copy2(path, staged / path.name)


def _save_tokenizer(folder: Path, staged: Path) -> None:
    from jpo_ray.engine.model import load_tokenizer

    load_tokenizer(folder).save_pretrained(staged)


def _end_at_eos(folder: Path) -> None:
    """Generation ends at the token that training closed every response with, whatever the base model's ended at."""
    from transformers import AutoConfig, GenerationConfig

    from jpo_ray.engine.model import load_tokenizer

    own = (folder / "generation_config.json").exists()
    config = AutoConfig.from_pretrained(folder)
    found = GenerationConfig.from_pretrained(folder) if own else GenerationConfig.from_model_config(config)
    tokenizer = load_tokenizer(folder)
    ends = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
    known = [end for end in ends if end is not None]
    if tokenizer.eos_token_id not in known:
        known.append(tokenizer.eos_token_id)
    found.eos_token_id = known if len(known) > 1 else known[0]
    if found.pad_token_id is None:
        found.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    found.save_pretrained(folder)
