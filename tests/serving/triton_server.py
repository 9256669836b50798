"""The real tritonserver, from the wheel of nvidia-pytriton: without its wrapper, and with the Python backend only."""

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READY_WITHIN_S = 90.0
STOPS_WITHIN_S = 45.0
"""More than the 30 s that Triton waits for clients that stay connected over HTTP."""


@dataclass
class Server:
    """A running server: its ports, its process and its log."""

    grpc: str
    http: str
    metrics: str
    process: "subprocess.Popen[bytes]"
    log: Path

    def read_log(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_ready(self) -> bool:
        from tritonclient.http import InferenceServerClient

        try:
            with InferenceServerClient(self.http) as client:
                return bool(client.is_server_ready())
        except (OSError, Exception):  # noqa: BLE001 - nobody listens yet
            return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def make_backends(folder: Path) -> Path:
    """Lay out the Python backend with the stub of this Python, as the server wants it."""
    import pytriton

    root = Path(str(pytriton.__file__)).parent / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(root / "backends" / "python", folder / "python")
    for file in (root / "python_backend_stubs" / version).iterdir():
        shutil.copy(file, folder / "python")
    return folder


def environment() -> dict[str, str]:
    """Let the stub find this Python, its library and its packages: it ignores PYTHONPATH."""
    site = Path(sysconfig.get_path("purelib"))
    libraries = [str(sysconfig.get_config_var("LIBDIR")), str(site / "nvidia_pytriton.libs")]
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": ":".join(libraries),
    }


@contextmanager
def serving(repository: Path, folder: Path, *options: str, wait: bool = True) -> Iterator[Server]:
    """Serve a repository inside the `with` block; ``folder`` is for backends and the log."""
    import pytriton

    backends = folder / "backends"
    if not backends.exists():
        make_backends(backends)
    binary = Path(str(pytriton.__file__)).parent / "tritonserver" / "bin" / "tritonserver"
    ports = [free_port() for _ in range(3)]
    names = ("--grpc-port", "--http-port", "--metrics-port")
    arguments = [f"{name}={port}" for name, port in zip(names, ports, strict=True)]
    log = folder / f"server-{ports[0]}.log"
    command: list[Any] = [binary, f"--model-repository={repository}", f"--backend-directory={backends}", *arguments]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *options], env=environment(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
    grpc, http, metrics = (f"127.0.0.1:{port}" for port in ports)
    server = Server(grpc=grpc, http=http, metrics=metrics, process=process, log=log)
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while wait and not server.is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"tritonserver is not ready:\n{server.read_log()[-3000:]}")
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(STOPS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
