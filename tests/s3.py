"""A real S3 server of its own (moto's), on a port of its own. Run as a script it serves until it is killed."""

import os
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

ACCOUNT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}


@dataclass(frozen=True)
class S3:
    port: int
    process: "subprocess.Popen[str]"
    host: str = "127.0.0.1"

    def uri(self, bucket: str = "runs", path: str | None = None) -> str:
        """A folder that nothing is in, unless it is named."""
        path = path or secrets.token_hex(4)
        return f"s3://{bucket}/{path}?endpoint_override={self.host}:{self.port}&scheme=http"

    def deny(self, after: float) -> None:
        """Require valid keys, of which there are none, after so many more requests (`inf`: never)."""
        urlopen(
            Request(
                f"http://{self.host}:{self.port}/moto-api/reset-auth",
                str(after).encode(),
                {"Content-Type": "text/plain"},
                method="POST",
            )
        ).close()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def start_s3(host: str = "127.0.0.1") -> S3:
    """Start a server at an address of this machine, with a bucket `runs`."""
    process = subprocess.Popen([sys.executable, Path(__file__), host], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(process.stdout.readline())
    urlopen(Request(f"http://{host}:{port}/runs", method="PUT")).close()
    return S3(port, process, host)


def serve(host: str) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as those of other servers

        def log_request(self, *_: object) -> None:
            pass

    server = make_server(host, 0, DomainDispatcherApplication(create_backend_app), threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)  # noqa: T201
    server.serve_forever()


if __name__ == "__main__":
    os.environ |= ACCOUNT
    serve(sys.argv[1])
