"""A GCS server of its own (gcp-storage-emulator), on its own port. Run as a script it serves until it is killed."""

import secrets
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GCS:
    port: int
    process: "subprocess.Popen[str]"

    def uri(self, bucket: str = "runs", path: str | None = None) -> str:
        """A folder that nothing is in, unless it is named."""
        return gcs_uri(self.port, bucket, path or secrets.token_hex(4))

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


def gcs_uri(port: int, bucket: str, path: str) -> str:
    return f"gs://anonymous@{bucket}/{path}?scheme=http&endpoint_override=127.0.0.1:{port}"


def start_gcs() -> GCS:
    """Start a server, with a bucket `runs`."""
    process = subprocess.Popen([sys.executable, Path(__file__)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return GCS(int(process.stdout.readline()), process)


def serve() -> None:
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket="runs")
    server.start()
    print(server._api._httpd.server_port, flush=True)  # noqa: T201
    threading.Event().wait()


if __name__ == "__main__":
    serve()
