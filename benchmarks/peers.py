"""Starting, timing and stopping the servers that are compared, each by its own process id."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType


@dataclass(frozen=True)
class Peer:
    """How to start one server on a model of `shapes.py`; `{port}` is filled in."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def available(
    folder: Path, threads: int, llama_server: str | None, quantization: str, llama_model: Path
) -> list[Peer]:
    """quantd, and each peer that is installed and has its weights in `folder`."""
    path = folder if (folder / "config.json").exists() else folder / "model.gguf"
    arguments = ["serve", f"model={path}", "--host", "127.0.0.1", "--port", "{port}"]
    arguments += ["--quantization", quantization]
    if path == folder and not (folder / "model.safetensors").exists():
        arguments += ["--load-format", "dummy"]
    arguments += ["--threads", str(threads)]
    peers = [Peer("quantd", (sys.executable, "-m", "quantd.daemon", *arguments))]
    llama = llama_server or shutil.which("llama-server")
    if llama and llama_model.exists():
        limits = ["-t", str(threads), "-tb", str(threads), "-np", "16", "-c", "32768"]
        host = ["--host", "127.0.0.1", "--port", "{port}"]
        command = (llama, "-m", str(llama_model), *limits, "-cb", *host)
        peers.append(Peer("llama.cpp", command))
    if (vllm := shutil.which("vllm")) and (folder / "model.safetensors").exists():
        limits = ["--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "32"]
        command = (vllm, "serve", str(folder), "--served-model-name", "model", *limits)
        command += ("--host", "127.0.0.1", "--port", "{port}")
        cores = f"0-{threads - 1}"
        environment = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": cores}
        peers.append(Peer("vLLM", command, environment))
    return peers


class RunningPeer:
    """A context: the server is up and has answered once inside it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.url = ""
        self.start_seconds = 0.0
        self._log = Path(tempfile.gettempdir(), f"benchmark-{peer.name}-{os.getpid()}.log")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RunningPeer:
        port = _free_port()
        command = [part.replace("{port}", str(port)) for part in self.peer.command]
        self.url = f"http://127.0.0.1:{port}"
        started = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self.peer.environment,
            )
        try:
            self._first_token(deadline=started + 300)
        except BaseException:
            self._stop()
            raise
        self.start_seconds = time.monotonic() - started
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text(errors="replace")

    def peak_mebibytes(self) -> int:
        """Peak resident memory of the server's process and its children, added up."""
        assert self._process is not None
        return sum(_high_water(pid) for pid in _tree(self._process.pid)) // 1024

    def _first_token(self, deadline: float) -> None:
        assert self._process is not None
        prompt = list(range(300, 316))
        body = json.dumps({"model": "model", "prompt": prompt, "max_tokens": 1}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", body, headers)
        last: Exception | None = None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                tail = self._log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.peer.name} ended by itself:\n{tail}")
            try:
                urllib.request.urlopen(request, timeout=300).read()
                return
            except OSError as error:
                last = error
                time.sleep(0.02)
        raise TimeoutError(f"{self.peer.name} gave no answer: {last}")

    def _stop(self) -> None:
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tree(pid: int) -> list[int]:
    pids = [pid]
    for parent in pids:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                children = Path(f"/proc/{parent}/task/{task}/children").read_text().split()
                pids += [int(child) for child in children]
        except OSError:
            continue
    return list(dict.fromkeys(pids))


def _high_water(pid: int) -> int:
    """VmHWM in KiB, 0 for a process that is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
