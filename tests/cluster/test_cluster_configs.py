"""What is shipped in `configs/cluster/` is read by those who will read it, as far as they are here."""

import json
import shlex
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.runtime_env import RuntimeEnv

from jpo_ray.cli_parser import STAGE_HELP
from jpo_ray.cluster.submission import read_runtime_env

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "configs" / "cluster"


def read(name: str) -> dict[str, Any]:
    found = yaml.safe_load((FOLDER / name).read_text())
    assert isinstance(found, dict)
    return found


def test_every_file_here_is_read_by_a_test() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"runtime_env.yaml", "rayjob.yaml", "launcher.yaml"}


def test_the_runtime_environment_is_one_for_ray() -> None:
    found = read_runtime_env(FOLDER / "runtime_env.yaml")
    assert RuntimeEnv(**found, working_dir="https://example.org/a.zip").env_vars() == found["env_vars"]


def test_the_launcher_file_is_one_for_ray_up() -> None:
    """By the launcher's own defaults, schema and checks."""
    config = prepare_config(read("launcher.yaml"))
    validate_config(config)
    assert config["available_node_types"]["gpu"]["resources"] == {"CPU": 96, "GPU": 8}
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in command for command in starts if "ray start" in command)


def test_the_rayjob_has_what_kuberay_asks_for() -> None:
    job = read("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    script = shlex.split(spec["entrypoint"])[1].removeprefix("/app/")
    assert (REPOSITORY / script).is_file()
    assert RuntimeEnv(**yaml.safe_load(spec["runtimeEnvYAML"])).env_vars()
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == "2.60.0"
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    # KubeRay puts the text behind `--resources=` on a shell's command line.
    (said,) = shlex.split(cluster["workerGroupSpecs"][0]["rayStartParams"]["resources"])
    assert json.loads(said) == {"cpu_node": 1}


def test_every_stage_has_a_job() -> None:
    jobs = {path.stem for path in (REPOSITORY / "jobs").glob("*.py")}
    assert jobs == {*STAGE_HELP, "align", "scale"}
