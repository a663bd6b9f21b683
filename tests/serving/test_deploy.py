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
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from jpo_ray.errors import InputError
from jpo_ray.serving.deploy import build
from serving.endpoint import BEARER, KEY, START_TIMEOUT_S

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"
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
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}  # Ray's own, which its users may have on or off
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
    """With a whole model beside the adapters, which has an engine of its own behind the front."""
    dashboard, environment = cluster
    port = free_port()
    file = yaml.safe_load((ROOT / "configs" / "serve" / "reference.yaml").read_text())
    file["http_options"]["port"] = port
    merged = shutil.copytree(served_run / "sft", tmp_path / "merged")
    arguments = {"whole_models": {"merged": str(merged)}, "state_dir": str(tmp_path / "state"), "cpus_per_replica": 0.5}
    file["applications"][0]["args"] = {"run_dir": str(served_run)} | arguments
    (tmp_path / "deploy.yaml").write_text(yaml.safe_dump(file))
    wait_for(f"{dashboard}/api/version", 60, {"authorization": f"Bearer {TOKEN}"})
    command = [str(BIN / "serve"), "deploy", "--address", dashboard, str(tmp_path / "deploy.yaml")]
    subprocess.run(command, env=environment, check=True, timeout=120, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    wait_for(f"{url}/ready", START_TIMEOUT_S)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    with httpx.Client(base_url=url, headers=BEARER, timeout=60) as client, endpoint_client(url) as official:
        names = {card["id"] for card in client.get("/v1/models").json()["data"]}
        assert names == {"sft", "merged", "jpo", "dpo.one"}
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Name a fruit."}], "temperature": 0}
        asked |= {"max_tokens": 12}
        whole = {
            name: official.chat.completions.create(model=name, **asked).choices[0].message.content for name in names
        }
        assert whole["merged"] == whole["sft"] != whole["jpo"]
        for name in ("merged", "jpo"):
            pieces = official.chat.completions.create(model=name, stream=True, **asked)
            assert "".join(event.choices[0].delta.content or "" for event in pieces) == whole[name]
        body = {"model": "merged", "prompt": "a", "max_tokens": 4, "stop": [""]}
        assert client.post("/v1/completions", json=body).status_code == 422
        items = [{"instruction": "Name a fruit.", "response": "A pear."}]
        score = client.post("/v1/score", json={"model": "merged", "items": items}).json()["data"][0]
        assert (score["score"], score["beta"]) == (pytest.approx(0, abs=1e-4), 0.1)


def wait_for(url: str, seconds: float, headers: dict[str, str] | None = None) -> None:
    deadline, status = time.monotonic() + seconds, 0
    while status != 200 and time.monotonic() < deadline:
        time.sleep(1)
        with suppress(httpx.TransportError):
            status = httpx.get(url, headers=headers).status_code
    assert status == 200


def endpoint_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
