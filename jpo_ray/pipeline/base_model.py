"""The model that a run starts from: a folder, a name on the Hub, the sandbox's, one made of the run's own text, or an
adapter merged into its base.
"""

from pathlib import Path
from typing import Any

from jpo_ray import records
from jpo_ray.config import SANDBOX, TINY
from jpo_ray.pipeline.context import Context, Spec

MODEL_KEY = "model.model_name_or_path"


def base_specs(context: Context) -> list[Spec]:
    """`base` is an artifact only where the base model is made: from the run's own text, or from an adapter."""
    if context.config.model.model_name_or_path == TINY:
        return [_tiny_spec(context)]
    adapter = adapter_to_start_from(context)
    return [_merged_spec(context, adapter)] if adapter else []


def _tiny_spec(context: Context) -> Spec:
    items = context.standing("items", "items").fingerprint

    def make(out: Path) -> dict[str, Any]:
        from jpo_ray.sandbox.model import make_tiny_model

        texts = item_texts(records.read_table(context.path("items") / "items.parquet", records.ITEMS))
        make_tiny_model(texts, out, seed=context.config.seed)
        return {"texts": len(texts)}

    return Spec("base", "sft", {"items": items}, {"seed": context.config.seed}, make)


def _merged_spec(context: Context, adapter: Path) -> Spec:
    """An adapter and its base as one model: what training starts from and the reference is, never the bare base."""
    from jpo_ray.cache import cache_folder
    from jpo_ray.engine.adapters import base_of
    from jpo_ray.engine.merging import merge_adapter
    from jpo_ray.engine.model import model_hash

    base, dtype = base_of(adapter, MODEL_KEY, cache_folder()), context.config.model.dtype
    inputs = {"adapter": model_hash(adapter, cache_folder()), "base": model_hash(base, cache_folder())}
    return Spec("base", "sft", inputs, {"dtype": dtype}, lambda out: merge_adapter(adapter, base, out, dtype))


def base_facts(context: Context) -> dict[str, str]:
    """The base model's name, for those who read an artifact; a folder's begins so that it is taken for nothing else."""
    name = context.config.model.model_name_or_path
    is_relative = name not in (TINY, SANDBOX) and name[:1] not in "./~" and Path(name).exists()
    return {"base_model": f"./{name}" if is_relative else name}


def adapter_to_start_from(context: Context) -> Path | None:
    """The folder of the adapter that `model.model_name_or_path` names; None where it names a model."""
    from jpo_ray.engine.merging import adapter_named

    name = context.config.model.model_name_or_path
    return None if name in (TINY, SANDBOX) else adapter_named(name, MODEL_KEY)


def item_texts(items: Any) -> list[str]:
    """The distinct texts of the items, from which a tiny model's tokenizer is made."""
    return list(dict.fromkeys([*items["instruction"].to_pylist(), *items["response"].to_pylist()]))


def base_model(context: Context) -> tuple[Path, str]:
    """Folder and hash of the base model."""
    from jpo_ray.cache import cache_folder
    from jpo_ray.engine.model import model_hash, resolve_model

    name = context.config.model.model_name_or_path
    if name == TINY or adapter_to_start_from(context):
        return context.path("base"), context.specs_of("sft")[0].fingerprint
    if name == SANDBOX:
        from jpo_ray.sandbox import BASE_MODEL

        folder = resolve_model(str(BASE_MODEL))
    else:
        folder = resolve_model(name)
    return folder, model_hash(folder, cache_folder())
