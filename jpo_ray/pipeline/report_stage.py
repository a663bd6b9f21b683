"""The report stage."""

from pathlib import Path
from typing import Any

from jpo_ray.errors import InputError
from jpo_ray.pipeline.context import Context, Spec, StaleArtifact


def report_specs(context: Context) -> list[Spec]:
    inputs = _standing_so_far(context)
    if not inputs:
        raise InputError(f"{context.run.where}: nothing to report yet; run `jpo run` first")

    def make(out: Path) -> dict[str, Any]:
        from jpo_ray.evaluation.report import make_report

        return make_report(context.run, context.config, out)

    slice_ = {"config": context.config.model_dump(mode="json")}
    return [Spec("report", "report", inputs, slice_, make)]


def _standing_so_far(context: Context) -> dict[str, str]:
    """Artifacts of this config up to the first stage that has not run. Raises `InputError` on one of another config."""
    found: dict[str, str] = {}
    for stage in (name for name in context.specs if name != "report"):
        try:
            specs = context.specs_of(stage)
        except StaleArtifact:
            raise
        except InputError:  # what this stage needs is not there yet
            break
        for spec in specs:
            manifest = context.run.manifest(spec.artifact)
            if manifest is not None and manifest.fingerprint != spec.fingerprint:
                raise context.stale(spec.artifact, stage)
            if manifest is not None:
                found[spec.artifact] = manifest.fingerprint
    return found
