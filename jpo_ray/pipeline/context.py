"""How a stage runs: what it is made from, whether it stands already, and building it."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from jpo_ray.artifacts import Manifest, stage_fingerprint
from jpo_ray.config import RunConfig
from jpo_ray.config_cluster import ClusterConfig
from jpo_ray.engine.tracking import Tracking, trackers_of
from jpo_ray.errors import InputError
from jpo_ray.runs import RunDir


class StaleArtifact(InputError):
    """An artifact stands that was made with another config or from other input."""


@dataclass(frozen=True)
class Spec:
    """One artifact to be: its inputs (name -> hash), the config slice it depends on, and how to make it."""

    artifact: str
    stage: str
    inputs: Mapping[str, str]
    config: Mapping[str, Any]
    make: Callable[[Path], dict[str, Any]]
    keep_partial: bool = False

    @property
    def fingerprint(self) -> str:
        return stage_fingerprint(self.artifact, self.inputs, self.config)


@dataclass
class Context:
    """One invocation: the run directory, the config, the console, and Ray once a stage asks for it."""

    run: RunDir
    config: RunConfig
    console: Console
    specs: Mapping[str, Callable[["Context"], list[Spec]]]  # stage -> its artifacts
    stack: ExitStack
    in_trial: bool = False  # one of several trainings side by side, in a process of its own
    connected: Callable[["Context"], None] = lambda _: None  # called once Ray is there
    _ray: Any = None
    _known: dict[str, list[Spec]] = field(default_factory=dict)

    def ray(self) -> Any:
        """Ray, started at the first call."""
        if self._ray is None:
            from jpo_ray.cluster.session import ray_session

            self._ray = self.stack.enter_context(ray_session(self.config.cluster))
            self.connected(self)
        return self._ray

    def ray_with_a_core(self) -> Any:
        """Ray, once there is room for a task of `pairs`; they take as many cores as there are."""
        from jpo_ray.cluster.resources import await_resources, task_resources

        cluster = self.cluster("pairs")
        await_resources(self.ray(), cluster, "pairs", [task_resources(cluster)])
        return self.ray()

    def cluster(self, stage: str) -> ClusterConfig:
        """What the stage may use of it."""
        return self.config.cluster.of(stage)

    def specs_of(self, stage: str) -> list[Spec]:
        if stage not in self._known:
            self._known[stage] = self.specs[stage](self)
        return self._known[stage]

    def standing(self, artifact: str, stage: str) -> Manifest:
        """The manifest of an input. Raises `InputError` where it is missing or was made from something else."""
        manifest = self.run.require(artifact, stage)
        spec = next((spec for spec in self.specs_of(stage) if spec.artifact == artifact), None)
        if spec is None or spec.fingerprint != manifest.fingerprint:
            raise self.stale(artifact, stage)
        return manifest

    def stale(self, artifact: str, stage: str) -> StaleArtifact:
        return StaleArtifact(
            f"{self.run.where}: `{artifact}` was made with another config or other input; run `jpo {stage}` again "
            "(or `jpo run` for all that changed)"
        )

    def path(self, artifact: str) -> Path:
        return self.run.path(artifact)

    def tracking(self, name: str, key: str, about: Mapping[str, Any] | None = None) -> Tracking:
        """Where the metrics of a model go; `key` tells one making of it from another."""
        return Tracking(trackers_of(self.config.report_to), self.run.root.resolve(), name, key, about or {})

    def seed(self, own: int | None = None) -> int:
        return self.config.seed if own is None else own


def run_stage(context: Context, stage: str) -> None:
    """Build what the stage's artifacts lack, and say what happened."""
    for spec in context.specs_of(stage):
        show(context, *build(context, spec))


def build(context: Context, spec: Spec) -> tuple[Manifest, bool]:
    """The artifact's manifest, and whether it was built now."""
    return context.run.build(
        spec.artifact, inputs=spec.inputs, config=spec.config, make=spec.make, keep_partial=spec.keep_partial
    )


def stands(context: Context, spec: Spec) -> bool:
    manifest = context.run.manifest(spec.artifact)
    return manifest is not None and manifest.fingerprint == spec.fingerprint


def show(context: Context, manifest: Manifest, built: bool) -> None:
    took = f"{manifest.seconds:.1f} s" if built else "stands already"
    facts = ", ".join(f"{_name(name)} {_shown(value)}" for name, value in manifest.counts.items() if _is_fact(value))
    context.console.print(
        f"[bold]{manifest.artifact}[/bold] [dim]{took}[/dim]  {facts}", highlight=False, soft_wrap=True
    )


def _name(name: str) -> str:
    return name.replace("_", " ")


def _is_fact(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool) and value not in (0, "")


def _shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
