"""An S3 server on loopback, for tests: moto's, in a process of its own that ends with the block or with its parent."""

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BUCKET = "bucket"


@dataclass(frozen=True)
class S3Server:
    """Where the server is, and what a client of it has to be told."""

    endpoint: str
    """http://127.0.0.1:PORT"""
    log: Path

    @property
    def env(self) -> dict[str, str]:
        """What the environment of all that are to reach it by s3://bucket/… has: commands, and nodes of a cluster."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "tester",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def requests(self) -> list[str]:
        """All so far, oldest first: `PUT /bucket/runs/a/config.yaml`."""
        return self.log.read_text().splitlines()

    def call(self, method: str, path: str, data: bytes | None = None) -> bytes:
        """What the server answers to a request without a signature."""
        kind = {"Content-Type": "application/octet-stream"}
        asked = urllib.request.Request(self.endpoint + path, data, kind, method=method)
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.read()


@contextlib.contextmanager
def serve() -> Iterator[S3Server]:
    """A server with the empty bucket `bucket`, on a free port of 127.0.0.1."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "requests"
        log.touch()
        # of the AWS settings of whoever runs the tests it is told nothing
        env = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        with subprocess.Popen(
            [sys.executable, __file__, str(log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        ) as process:
            assert process.stdin
            assert process.stdout
            try:
                port = process.stdout.readline().strip()
                assert port, "the S3 server did not start"
                server = S3Server(f"http://127.0.0.1:{port}", log)
                server.call("PUT", f"/{BUCKET}")
                yield server
            finally:
                process.kill()


def _main(log: str) -> None:
    """Serve until standard input ends; the port goes to standard output."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer
    from moto.moto_server.werkzeug_app import MotoRequestHandler

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with open(log, "a", buffering=1) as lines:

        def log_request(self: MotoRequestHandler, *_: object) -> None:
            lines.write(f"{self.command} {self.path}\n")

        MotoRequestHandler.log_request = log_request  # type: ignore[method-assign]
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        print(server.get_host_and_port()[1], flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    _main(sys.argv[1])
