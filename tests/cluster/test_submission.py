"""`jpo submit`: what is sent, what is refused before anything is, and jobs on a cluster with token authentication."""

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package

from cluster.nodes import Nodes, free_port, ray_nodes
from jpo_ray.cli import main
from jpo_ray.cluster.submission import MIB, SECRET_FILES, read_runtime_env, require_small, sent_files, upload_sizes
from jpo_ray.cluster.submission import submit as submit_job
from jpo_ray.errors import InputError

REPOSITORY = Path(__file__).parents[2]
KEY = "sk-canary-of-the-node"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_what_is_counted_is_what_ray_packs(tmp_path: Path) -> None:
    """.gitignore and .rayignore at every level, `excludes`, and what Ray leaves out by itself."""
    root = write(
        tmp_path / "project",
        {
            "a.py": "x" * 10, "data/kept.txt": "x" * 20, "data/left.bin": "x" * 1000, "data/.rayignore": "*.bin\n",
            ".gitignore": "runs/\n", "runs/one/big": "x" * 1000, ".git/objects": "x" * 1000, ".venv/lib": "x" * 1000,
            ".rayignore": "/docs/\n", "docs/page": "x" * 1000, "sub/docs/page": "x" * 30, "extra/file": "x" * 1000,
            "sub/__pycache__/a.pyc": "x" * 1000,
        },
    )  # fmt: skip
    sizes = upload_sizes(root, ["extra/"])
    assert sizes == {"a.py": 10, "data": 26, ".gitignore": 6, ".rayignore": 7, "sub": 30}
    package = tmp_path / "package.zip"
    ignored = [".git", ".venv", "venv", "__pycache__", "extra/"]
    create_package(str(root), package, include_gitignore=True, excludes=ignored)
    with zipfile.ZipFile(package) as packed:
        assert sum(entry.file_size for entry in packed.infolist()) == sum(sizes.values())


def test_a_folder_that_is_too_large_is_refused_by_name_and_size(tmp_path: Path) -> None:
    write(tmp_path, {"code.py": "x", "weights/a.bin": ""})
    os.truncate(tmp_path / "weights" / "a.bin", 101 * MIB)  # takes no room on disk
    message = (
        r"--working-dir .*: 101 MiB would be sent and Ray takes less than 100; .* \.rayignore .*: weights 101 MiB, c"
    )
    with pytest.raises(InputError, match=message):
        require_small(tmp_path, [])
    require_small(tmp_path, ["weights/"])
    write(tmp_path, {".rayignore": "*.bin"})
    require_small(tmp_path, [])


def test_a_checkout_sends_what_jobs_need_and_little_more() -> None:
    sizes = upload_sizes(REPOSITORY, [])
    assert {"jobs", "jpo_ray", "configs", "pyproject.toml"} <= sizes.keys()
    assert not {"tests", "docs", "benchmarks", "runs", ".git", ".venv"} & sizes.keys()
    assert sum(sizes.values()) < 20 * MIB


@pytest.mark.parametrize("value", ["abc", 987654])
@pytest.mark.parametrize(
    "name", ["OPENAI_API_KEY", "HF_TOKEN", "aws_secret_access_key", "PGPASSWORD", "AWS_ACCESS_KEY_ID"]
)
def test_secrets_are_refused_in_a_runtime_environment(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "env.yaml"
    path.write_text(yaml.safe_dump({"env_vars": {"JPO_CACHE": "/shared", name: value}}))
    with pytest.raises(
        InputError, match=rf"env_vars\.{name}: the dashboard shows a job's environment to everybody"
    ) as e:
        read_runtime_env(path)
    assert str(value) not in str(e.value)


def test_names_that_only_look_like_secrets_are_sent(tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    names = ["TOKENIZERS_PARALLELISM", "RAY_AUTH_TOKEN_PATH", "AWS_WEB_IDENTITY_TOKEN_FILE", "KEYBOARD", "JPO_CACHE"]
    path.write_text(yaml.safe_dump({"env_vars": dict.fromkeys(names, "abc")}))
    assert read_runtime_env(path)["env_vars"].keys() == set(names)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("env_vars: {1: a}", "the key 1 is of type <class 'int'>"),
        ("env_vars: {OMP_NUM_THREADS: 4}", "the value 4 is of type <class 'int'>"),
        ("env_vars: [a]", "['env_vars'] must be of type Dict[str, str]"),
        ("excludes: runs/", "['excludes'] must be of type List[str]"),
        ("excludes: [1]", "['excludes'] must be of type List[str]"),
        ("py_modules: code", "`py_modules` must be a list of strings"),
        ("pip: 3", "pip"),
    ],
)
def test_what_ray_cannot_read_in_a_runtime_environment_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))}: .*{re.escape(said)}") as refused:
        read_runtime_env(path)
    assert "\n" not in str(refused.value)


def test_what_is_left_empty_in_a_runtime_environment_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    path.write_text("excludes:\nenv_vars:\npip:\npy_modules:\nworking_dir:\n")
    assert read_runtime_env(path) == {}


NOBODY = "http://127.0.0.1:9"


def said_before_sending(tmp_path: Path, environment: dict[str, Any]) -> tuple[str, str]:
    """What `submit` says, and why it ends, where no cluster answers."""
    path = tmp_path / "env.yaml"
    path.write_text(yaml.safe_dump(environment))
    said: list[str] = []
    with pytest.raises(InputError) as refused:
        submit_job(NOBODY, ["true"], path, tmp_path / "project", said.append, wait=False)
    return "".join(said), str(refused.value)


def test_files_that_may_hold_secrets_are_not_sent_and_named(tmp_path: Path) -> None:
    files = dict.fromkeys([".env", "code.py", "deep/ca.pem", "deep/a.key", ".env.local", "ignored/b.key"], "x")
    write(tmp_path / "project", files | {".rayignore": "ignored/"})
    said, refused = said_before_sending(tmp_path, {"excludes": ["!ca.pem"]})
    assert said == (
        "not sent, since they may hold secrets: .env, .env.local, deep/a.key (`excludes: ['!NAME']` in the runtime "
        "environment sends one)\n"
    )
    assert "no Ray dashboard answers there" in refused
    sent = sent_files(tmp_path / "project", [*SECRET_FILES, "!ca.pem"])
    package = tmp_path / "package.zip"
    create_package(str(tmp_path / "project"), package, include_gitignore=True, excludes=[*SECRET_FILES, "!ca.pem"])
    with zipfile.ZipFile(package) as packed:
        packed_files = {entry.filename for entry in packed.infolist() if not entry.is_dir()}
    assert packed_files == sent.keys() == {".rayignore", "code.py", "deep/ca.pem"}


def test_a_working_directory_in_the_runtime_environment_is_not_used_and_that_is_said(tmp_path: Path) -> None:
    write(tmp_path / "project", {"code.py": "x"})
    said, _ = said_before_sending(tmp_path, {"working_dir": "elsewhere"})
    project = tmp_path / "project"
    assert said == f"{tmp_path / 'env.yaml'}: its working_dir is not used, but --working-dir ({project})\n"


def test_modules_are_sized_too(tmp_path: Path) -> None:
    """By what Ray sends of them: also what it leaves out of a working directory by itself."""
    write(tmp_path, {"project/code.py": "x", "module/__pycache__/a": "", "wheel-1-py3-none-any.whl": ""})
    os.truncate(tmp_path / "module" / "__pycache__" / "a", 101 * MIB)
    os.truncate(tmp_path / "wheel-1-py3-none-any.whl", 102 * MIB)
    for module, size in (("module", 101), ("wheel-1-py3-none-any.whl", 102)):
        _, refused = said_before_sending(tmp_path, {"py_modules": [str(tmp_path / module)]})
        assert f"py_modules {tmp_path / module}: {size} MiB would be sent and Ray takes less than 100" in refused
    _, refused = said_before_sending(
        tmp_path, {"py_modules": ["https://host/m.zip", str(tmp_path / "module")], "excludes": ["__pycache__"]}
    )
    assert "no Ray dashboard answers there" in refused


def submit(nodes: Nodes, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`jpo submit` from the repository, as its user's shell would run it."""
    line = [sys.executable, "-m", "jpo_ray.cli", "submit", "--address", nodes.url, *command]
    environment = nodes.environment | environment
    return subprocess.run(line, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)


def test_a_cluster_that_does_not_answer_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    assert main(["submit", "--address", address, "--working-dir", str(tmp_path), "--", "true"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"jpo: --address {address}: no Ray dashboard answers there")
    assert error.count("\n") == 1


def test_a_run_directory_in_the_jobs_copy_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "working_dir_files" / "_ray_pkg_1"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    config = REPOSITORY / "configs" / "sandbox.yaml"
    assert main(["items", "--config", str(config), "--run-dir", "runs/x"]) == 2
    assert capsys.readouterr().err.startswith("jpo: --run-dir runs/x: would end with the job")
    experiment = REPOSITORY / "configs" / "experiments" / "bands.yaml"
    assert main(["scale", "--experiment", str(experiment), "--run-dir", "runs/x"]) == 2
    assert capsys.readouterr().err.startswith("jpo: --run-dir runs/x: would end with the job")
    assert list(inside.iterdir()) == []


@pytest.fixture(scope="module")
def head() -> Iterator[Nodes]:
    """One node of two CPUs, whose environment has a key."""
    with ray_nodes(OPENAI_API_KEY=KEY) as nodes:
        nodes.start_head(2, trainer=1)
        nodes.environment.pop("OPENAI_API_KEY")  # who submits has none
        yield nodes


SEES = """
import os, sys, jpo_ray
print("code", "working_dir_files" in jpo_ray.__file__, "key", os.environ["OPENAI_API_KEY"] == sys.argv[1])
sys.exit(5)
"""
CONFIG: dict[str, Any] = {
    "items": {"train": [{"path": "sandbox", "limit": 40}], "validation": [{"path": "sandbox", "limit": 10}]},
    "model": {"model_name_or_path": "sandbox", "max_length": 256},
    "judge": {"annotator": "sandbox"},
    "sft": None,
    "train": [{"objective": "simpo", "learning_rate": 1e-3, "warmup_steps": 0}],  # needs no reference
    "sample": None,
    "evaluate": None,
    "cluster": {"cpus_per_worker": 1, "stages": {"train": {"custom_resources": {"trainer": 1}}}},
}


@pytest.mark.ray
def test_a_job_runs_what_was_sent_with_the_nodes_keys_and_ends_with_its_own_code(head: Nodes) -> None:
    done = submit(head, "--", "python", "-c", SEES, KEY)
    assert done.returncode == 5, done.stderr
    assert done.stdout.splitlines()[-1] == "code True key True"


@pytest.mark.ray
def test_another_token_is_refused_in_one_line(head: Nodes, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0" * 64)
    done = submit(head, "--", "true", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"jpo: --address {head.url}: the cluster wants a token")


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_pipeline_runs_as_a_job(head: Nodes, tmp_path: Path) -> None:
    """A small run, its cache where the runtime environment says, and nothing of it in the job's temporary folder."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "env.yaml").write_text(yaml.safe_dump({"env_vars": {"JPO_CACHE": str(tmp_path / "cache")}}))
    arguments = ["--config", str(tmp_path / "run.yaml"), "--run-dir", str(tmp_path / "run")]
    done = submit(head, "--runtime-env", str(tmp_path / "env.yaml"), "--", "python", "jobs/align.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "run" / "train" / "simpo" / "manifest.json").read_text())
    assert manifest["artifact"] == "train/simpo"
    assert (tmp_path / "run" / "report" / "index.html").exists()
    assert (tmp_path / "cache").is_dir()
    assert "Report: " in done.stdout
