"""`serve deploy` with a file as in configs/serve/, on a Ray cluster of its own."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import yaml

from jpo_ray.errors import InputError
from jpo_ray.serving.deploy import build
from serving.endpoint import BEARER, KEY

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_deployed_application_needs_keys_unless_it_says_loopback(
    served_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from jpo_ray.serving import plan as planning

    monkeypatch.delenv("JPO_API_KEYS", raising=False)
    planned = planning.make_plan(
        planning.ServeConfig(run_dir=str(served_run), state_dir=str(tmp_path / "state")), keys_required=True
    )
    assert planned.keys_required
    with pytest.raises(InputError, match="unknown key `prot`"):
        build({"run_dir": str(served_run), "prot": 1})


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Address of the dashboard of a Ray head, and its environment."""
    dashboard, port = free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    temporary = tempfile.mkdtemp(prefix="jpo", dir="/tmp")  # Ray's socket paths must be short; not that of others
    environment |= {"JPO_API_KEYS": KEY, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": temporary}
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += [
        f"--temp-dir={temporary}",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
        "--disable-usage-stats",
    ]
    with (tmp_path / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.vllm
@pytest.mark.slow
def test_serve_deploy(cluster: tuple[str, dict[str, str]], served_run: Path, tmp_path: Path) -> None:
    dashboard, environment = cluster
    port = free_port()
    file = yaml.safe_load((ROOT / "configs" / "serve" / "reference.yaml").read_text())
    file["http_options"]["port"] = port
    file["applications"][0]["args"] = {"run_dir": str(served_run), "state_dir": str(tmp_path / "state")}
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump(file))
    for _ in range(60):
        try:
            if httpx.get(f"{dashboard}/api/version").status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(1)
    command = [str(BIN / "serve"), "deploy", "--address", dashboard, str(tmp_path / "deploy.yaml")]
    subprocess.run(command, env=environment, check=True, timeout=120, cwd=ROOT)
    deadline, status = time.monotonic() + 240, 0
    while status != 200 and time.monotonic() < deadline:
        time.sleep(2)
        try:
            status = httpx.get(f"http://127.0.0.1:{port}/ready").status_code
        except httpx.TransportError:
            status = 0
    assert status == 200
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 401
    body = {"model": "jpo", "messages": [{"role": "user", "content": "Name a fruit."}], "max_tokens": 4}
    reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, headers=BEARER, timeout=60)
    assert reply.json()["usage"]["completion_tokens"] >= 1
