"""Real Ray nodes of one cluster on this machine, started as people start them: `ray start`, with token authentication.

Each has a raylet, agents and resources of its own. Where this machine lets us make namespaces, the nodes besides the
head have an address of their own too, and if wanted a disk.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

RAY = Path(sys.executable).with_name("ray")
START_S = 120
LINK = "jpo0"  # of every namespace's network
# Run inside a namespace: an empty disk in place of each folder up to `--`, then the command.
OWN_DISK = 'while [ "$1" != -- ]; do mount -t tmpfs none "$1" || exit; shift; done; shift; exec "$@"'


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass
class Node:
    process: "subprocess.Popen[bytes]"
    namespace: str | None = None

    def processes(self) -> list[psutil.Process]:
        """All that the node consists of, its workers included."""
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid)
            return [started, *started.children(recursive=True)]
        return []

    def runs(self, name: str) -> bool:
        """Whether a worker of it calls itself `name`."""
        for process in self.processes():
            with suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    return True
        return False

    def has(self, path: Path) -> bool:
        """Whether it sees such a file or folder."""
        return Path(f"/proc/{self.process.pid}/root{path}").exists()

    def kill(self) -> None:
        """Without a word, as power failures do it: others are not told by closed connections, where it has its own."""
        if self.namespace:
            _ip("-n", self.namespace, "link", "set", LINK, "down")
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> None:
        mine = self.processes()
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        for process in psutil.wait_procs(mine, 10)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)


@dataclass
class Nodes:
    """A cluster. `environment` is what a client needs: the token's file. `hidden` are folders of this machine that the
    nodes besides the head do not see.
    """

    folder: Path
    environment: dict[str, str]
    head_address: str = "127.0.0.1"
    network: "Network | None" = None
    hidden: Sequence[Path] = ()
    port: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Of the head, for a driver on this machine."""
        return f"{self.head_address}:{self.port}"

    @property
    def url(self) -> str:
        """Of the dashboard."""
        return f"http://127.0.0.1:{self.dashboard}"

    @property
    def temporary(self) -> Path:
        """Ray's own folder, of the same name on all nodes."""
        return self.folder / "ray"

    def start_head(self, cpus: int, **resources: float) -> None:
        client = free_port()
        self._start(
            cpus, "--head", f"--port={self.port}", f"--dashboard-port={self.dashboard}", "--dashboard-host=127.0.0.1",
            f"--ray-client-server-port={client}", f"--temp-dir={self.temporary}",
            f"--node-ip-address={self.head_address}", f"--resources={json.dumps(resources)}",
        )  # fmt: skip
        self._wait(1)

    def add(self, cpus: int) -> Node:
        """One more node; returns when the cluster has it."""
        place = f"--node-ip-address={self.head_address}"
        namespace = None
        if self.network is not None:
            namespace, address = self.network.add()
            place = f"--node-ip-address={address}"
        node = self._start(cpus, f"--address={self.address}", place, namespace=namespace)
        self._wait(len(self.nodes))
        return node

    def _start(self, cpus: int, *flags: str, namespace: str | None = None) -> Node:
        inside, environment = list[str](), self.environment
        if namespace:
            inside = ["ip", "netns", "exec", namespace]
            environment = environment | {"GLOO_SOCKET_IFNAME": LINK}
            if self.hidden:  # `ip` gives what it runs mounts of its own
                inside += ["sh", "-c", OWN_DISK, "sh", *map(str, self.hidden), str(self.temporary), "--"]
        command = [
            *inside, str(RAY), "start", "--block", "--disable-usage-stats", f"--num-cpus={cpus}",
            "--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}", *flags,
        ]  # fmt: skip
        log = (self.folder / f"node{len(self.nodes)}.log").open("wb")
        with log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.folder)
        self.nodes.append(Node(process, namespace))
        return self.nodes[-1]

    def _wait(self, count: int) -> None:
        """Until so many nodes are alive, asked of the cluster itself."""
        deadline = time.monotonic() + START_S
        while self._alive() < count:
            node = self.nodes[-1]
            said = (self.folder / f"node{len(self.nodes) - 1}.log").read_text()
            assert node.process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.5)

    def _alive(self) -> int:
        import requests

        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        with suppress(requests.RequestException, ValueError, KeyError):
            answer = requests.get(
                f"{self.url}/api/v0/nodes", headers={"Authorization": f"Bearer {token}"}, timeout=10
            ).json()
            return sum(row["state"] == "ALIVE" for row in answer["data"]["result"]["result"])
        return 0


@contextmanager
def ray_nodes(*, own_network: bool = False, hidden: Sequence[Path] = (), **environment: str) -> Iterator[Nodes]:
    """A cluster without nodes yet; `environment` is added to that of its nodes. What was started ends with it.

    `hidden` folders need a network of its own; where there can be none, `Nodes.network` is None.
    """
    folder = Path(tempfile.mkdtemp(prefix="jpo-", dir="/tmp"))  # short: Ray's sockets lie below it
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    kept["PATH"] = f"{RAY.parent}:{kept['PATH']}"  # jobs call `python`
    kept |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} | environment
    with made_network(own_network) as network:
        nodes = Nodes(folder, kept, network=network, hidden=hidden)
        if network is not None:
            nodes.head_address = network.head
        try:
            yield nodes
        finally:
            for node in reversed(nodes.nodes):
                node.stop()
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Network:
    """A bridge of this machine, and namespaces at it: hosts, as far as the network is concerned."""

    name: str
    prefix: str
    namespaces: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return f"{self.prefix}.1"

    def add(self) -> tuple[str, str]:
        """Another namespace and its address."""
        number = len(self.namespaces) + 2
        name, address = f"{self.name}-{number}", f"{self.prefix}.{number}"
        _ip("netns", "add", name)
        self.namespaces.append(name)
        _ip("link", "add", f"{self.name}v{number}", "type", "veth", "peer", "name", LINK, "netns", name)
        _ip("link", "set", f"{self.name}v{number}", "master", self.name, "up")
        for rest in (
            ["addr", "add", f"{address}/24", "dev", LINK],
            ["link", "set", LINK, "up"],
            ["link", "set", "lo", "up"],
        ):
            _ip("-n", name, *rest)
        return name, address


@contextmanager
def made_network(wanted: bool) -> Iterator[Network | None]:
    """A network of its own, or None where it is not wanted or this machine does not let us make one."""
    if not wanted or shutil.which("ip") is None:
        yield None
        return
    network = Network(f"jpo{os.getpid() % 100_000}", f"10.{77 + os.getpid() % 100}.{os.getpid() // 100 % 200}")
    try:
        _ip("link", "add", network.name, "type", "bridge")
    except subprocess.CalledProcessError:
        yield None
        return
    try:
        _ip("addr", "add", f"{network.head}/24", "dev", network.name)
        _ip("link", "set", network.name, "up")
        yield network
    finally:
        for namespace in network.namespaces:
            _ip("-n", namespace, "link", "delete", LINK)  # or it would go some time after the namespace
            _ip("netns", "delete", namespace)
        _ip("link", "delete", network.name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
