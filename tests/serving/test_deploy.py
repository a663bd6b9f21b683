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
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from jpo_ray.cli import main
from jpo_ray.engine.adapters import record_base
from serving.conftest import store_of
from serving.endpoint import BEARER, KEY, START_TIMEOUT_S
from serving.served_run import BETAS

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"
TOKEN_HEADER = {"authorization": f"Bearer {TOKEN}"}
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    dashboard: str
    environment: dict[str, str]
    folder: Path  # of the test

    def deploy(self, http: dict[str, Any], arguments: dict[str, Any], prefix: str = "/") -> None:
        """The reference's application, with other options of its proxies and its own."""
        file = yaml.safe_load((ROOT / "configs" / "serve" / "reference.yaml").read_text())
        file["http_options"] |= http
        file["applications"][0] |= {"args": arguments, "route_prefix": prefix}
        (self.folder / "deploy.yaml").write_text(yaml.safe_dump(file))
        command = [str(BIN / "serve"), "deploy", "--address", self.dashboard, str(self.folder / "deploy.yaml")]
        subprocess.run(command, env=self.environment, check=True, timeout=120, cwd=ROOT)

    def application(self) -> dict[str, Any]:
        reply = httpx.get(f"{self.dashboard}/api/serve/applications/", headers=TOKEN_HEADER)
        return reply.json()["applications"].get("jpo", {})  # type: ignore[no-any-return]

    def refusal_of_another(self, run_dir: Path) -> str:
        """What `jpo serve` says when it is asked to serve here too."""
        head = (Path(self.environment["RAY_TMPDIR"]) / "ray_current_cluster").read_text().strip()
        command = [str(BIN / "jpo"), "serve", "--run-dir", str(run_dir), f"address={head}"]
        command += [f"state_dir={self.folder / 'another'}", "cpus_per_replica=0.1"]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
        )
        assert done.returncode == 2, done.stderr[-2000:]
        return done.stderr

    def logs(self) -> str:
        folders = Path(self.environment["RAY_TMPDIR"]).glob("session_2*/logs/serve/replica_jpo_FrontServer*")
        return "".join(path.read_text() for path in folders)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def cluster(folder: Path, *, keys: bool = True) -> Iterator[Cluster]:
    """A Ray head of its own, where JPO_API_KEYS is in the environment or is not."""
    dashboard, port = free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "JPO_API_KEYS")}
    temporary = tempfile.mkdtemp(prefix="jpo", dir="/tmp")  # Ray's socket paths must be short; not that of others
    environment |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": temporary} | ({"JPO_API_KEYS": KEY} if keys else {})
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}  # Ray's own, which its users may have on or off
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", "--num-cpus=2"]
    command += [
        f"--temp-dir={temporary}",
        f"--dashboard-port={dashboard}",
        "--dashboard-host=127.0.0.1",
        "--disable-usage-stats",
    ]
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(f"{address}/api/version", 60, TOKEN_HEADER)
        yield Cluster(address, environment, folder)
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)


def test_serve_deploy(served_run: Path, tmp_path: Path) -> None:
    """With an exported model beside the adapters, which has an engine of its own behind the front."""
    port = free_port()
    merged = tmp_path / "merged"
    assert main(["export", "--run-dir", str(served_run), "--model", "jpo", "--out", str(merged)]) == 0
    coarse = shutil.copytree(store_of(served_run) / "third", tmp_path / "coarse")
    record_base(coarse, served_run / "sft", "0123456789abcdef", load_in_4bit=True)
    arguments = {"whole_models": {"merged": str(merged)}, "adapters": {"coarse": str(coarse)}, "max_num_seqs": 1}
    arguments |= {"run_dir": str(served_run), "state_dir": str(tmp_path / "state"), "cpus_per_replica": 0.5}
    url = f"http://127.0.0.1:{port}"
    with cluster(tmp_path) as deployed:
        deployed.deploy({"port": port}, arguments)
        wait_for(f"{url}/ready", START_TIMEOUT_S)
        assert "coarse was trained on a 4-bit base and is served on one in float32" in deployed.logs()
        assert httpx.get(f"{url}/v1/models").status_code == 401
        with httpx.Client(base_url=url, headers=BEARER, timeout=60) as client, endpoint_client(url) as official:
            every_model_answers(client, official)
            who_leaves_is_not_generated_for(client)
            said = deployed.refusal_of_another(served_run)
            assert "address: this cluster serves an application `jpo` already" in said
            assert client.get("/ready").status_code == 200


def every_model_answers(client: httpx.Client, official: openai.OpenAI) -> None:
    names = {card["id"] for card in client.get("/v1/models").json()["data"]}
    assert names == {"sft", "merged", "jpo", "dpo.one", "coarse"}
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Name a fruit."}], "temperature": 0}
    asked |= {"max_tokens": 12}
    whole = {name: official.chat.completions.create(model=name, **asked).choices[0].message.content for name in names}
    assert whole["merged"] == whole["jpo"] != whole["sft"]
    for name in ("merged", "jpo"):
        pieces = official.chat.completions.create(model=name, stream=True, **asked)
        assert "".join(event.choices[0].delta.content or "" for event in pieces) == whole[name]
    body = {"model": "merged", "prompt": "a", "max_tokens": 4, "stop": [""]}
    assert client.post("/v1/completions", json=body).status_code == 422
    items = [{"instruction": "Name a fruit.", "response": "A pear."}]
    scores = {
        name: client.post("/v1/score", json={"model": name, "items": items}).json()["data"][0]
        for name in ("merged", "jpo")
    }
    assert {name: score["beta"] for name, score in scores.items()} == {"merged": 0.1, "jpo": BETAS["jpo"]}
    merged, adapter = (scores[name]["score"] / scores[name]["beta"] for name in ("merged", "jpo"))
    assert merged == pytest.approx(adapter, abs=1e-3)
    assert abs(adapter) > 0.1


def who_leaves_is_not_generated_for(client: httpx.Client) -> None:
    """In the front's engine and in one behind it, each of which generates one answer at a time here."""
    for name in ("sft", "merged"):
        long: dict[str, Any] = {"model": name, "prompt": "a", "n": 8, "max_tokens": 240, "ignore_eos": True}
        began = time.monotonic()
        assert client.post("/v1/completions", json=long).status_code == 200
        whole_s = time.monotonic() - began
        with client.stream("POST", "/v1/completions", json=long | {"stream": True}) as left:
            next(left.iter_lines())
        began = time.monotonic()
        short = {"model": name, "prompt": "a", "max_tokens": 1}
        assert client.post("/v1/completions", json=short).status_code == 200
        assert time.monotonic() - began < whole_s / 2, name


def test_a_deployment_without_keys_answers_this_machine_alone(served_run: Path, tmp_path: Path) -> None:
    """Below a prefix, where the door is the same."""
    port = free_port()
    arguments = {"run_dir": str(served_run), "state_dir": str(tmp_path / "state"), "scoring": None}
    with cluster(tmp_path, keys=False) as deployed:
        deployed.deploy({"port": port}, arguments, prefix="/models")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/models", timeout=60) as client:
            wait_for(f"{client.base_url}ready", START_TIMEOUT_S)
            assert {card["id"] for card in client.get("v1/models").json()["data"]} == {"sft", "jpo", "dpo.one"}
            assert client.get("v1/models", headers={"host": "rebound.example"}).status_code == 403
            refused = client.post("v1/adapters", json={"name": "new", "folder": "extra"})
            assert (refused.status_code, refused.json()["error"]["type"]) == (403, "permission_error")
            assert client.delete("v1/adapters/jpo").status_code == 403
            with openai.OpenAI(base_url=f"{client.base_url}v1", api_key="none") as official:
                question: Any = {"messages": [{"role": "user", "content": "Name a fruit."}], "max_tokens": 4}
                assert official.chat.completions.create(model="jpo", **question).choices[0].message.content


def test_no_deployment_listens_to_the_network_without_keys(served_run: Path, tmp_path: Path) -> None:
    """Whatever `args.host` says, and for `jpo serve` on that cluster too: where Serve listens is what counts."""
    arguments = {"run_dir": str(served_run), "state_dir": str(tmp_path / "state"), "host": "127.0.0.1"}
    needs = "host 0.0.0.0: listens beyond this machine, which needs API keys"
    with cluster(tmp_path, keys=False) as deployed:
        deployed.deploy({"host": "0.0.0.0", "port": free_port()}, arguments)
        deadline = time.monotonic() + 120
        while deployed.application().get("status") != "DEPLOY_FAILED" and time.monotonic() < deadline:
            time.sleep(1)
        assert needs in deployed.application()["message"]
        assert not (tmp_path / "state").exists()
        assert needs in deployed.refusal_of_another(served_run)
        assert deployed.application()["status"] == "DEPLOY_FAILED"  # as it was


def wait_for(url: str, seconds: float, headers: dict[str, str] | None = None) -> None:
    deadline, status = time.monotonic() + seconds, 0
    while status != 200 and time.monotonic() < deadline:
        time.sleep(1)
        with suppress(httpx.TransportError):
            status = httpx.get(url, headers=headers).status_code
    assert status == 200


def endpoint_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
