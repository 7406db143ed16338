"""Starting, timing and stopping the servers that are compared, each by its own process id."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

_ADDRESS = ("--host", "127.0.0.1", "--port", "{port}")


@dataclass(frozen=True)
class Peer:
    """How to start one server; `{port}` in its command is filled in."""

    engine: str
    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Programs:
    """The program of each engine ("" where it is not there), and how many threads it may use."""

    threads: int
    llama_server: str = ""
    openvino_python: str = ""
    vllm: str = ""


def parse(text: str, programs: Programs) -> Peer:
    """`ENGINE:PATH`, for quantd also `ENGINE:PATH:QUANTIZATION`. ValueError says what is wrong."""
    engine, _, rest = text.partition(":")
    path, _, quantization = rest.partition(":")
    makers = {
        "quantd": (sys.executable, _quantd),
        "llama.cpp": (programs.llama_server, _llama),
        "openvino": (programs.openvino_python, _openvino),
        "vllm": (programs.vllm, _vllm),
    }
    if engine not in makers:
        raise ValueError(f"{text}: an engine is one of {', '.join(makers)}, not {engine!r}")
    program, arguments = makers[engine]
    if not program:
        raise ValueError(f"{text}: where is {engine}'s program? See --help")
    if not path or not Path(path).exists():
        raise ValueError(f"{text}: there is no file or folder {path!r}")
    if quantization and engine != "quantd":
        raise ValueError(f"{text}: only quantd quantizes while it loads")
    name = " ".join(part for part in (engine, Path(path).name, quantization) if part)
    command = arguments(Path(path), programs.threads)
    if quantization:
        command += ("--quantization", quantization)
    environment = {}
    if engine == "vllm":
        cores = f"0-{programs.threads - 1}"
        environment = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": cores}
    return Peer(engine, name, (program, *command), environment)


def _gguf_in(path: Path) -> Path:
    """The GGUF file in a folder that has no other checkpoint, else the path itself."""
    return path if (path / "config.json").exists() or path.is_file() else path / "model.gguf"


def _quantd(path: Path, threads: int) -> tuple[str, ...]:
    path = _gguf_in(path)
    command = ("-m", "quantd.daemon", "serve", f"model={path}", *_ADDRESS)
    if path.is_dir() and not (path / "model.safetensors").exists():
        command += ("--load-format", "dummy")
    return (*command, "--threads", str(threads))


def _llama(path: Path, threads: int) -> tuple[str, ...]:
    file = path / "model.gguf" if path.is_dir() else path
    limits = ("-t", str(threads), "-tb", str(threads), "-np", "16", "-c", "32768", "-cb")
    return ("-m", str(file), *limits, *_ADDRESS)


def _openvino(path: Path, threads: int) -> tuple[str, ...]:
    server = str(Path(__file__).with_name("openvino_server.py"))
    return (server, str(path), "--threads", str(threads), "--port", "{port}")


def _vllm(path: Path, threads: int) -> tuple[str, ...]:
    limits = ("--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "32")
    return ("serve", str(path), "--served-model-name", "model", *limits, *_ADDRESS)


class RunningPeer:
    """A context: the server is up and has answered once inside it."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.url = ""
        self.start_seconds = 0.0
        self._log = tempfile.TemporaryFile()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RunningPeer:
        port = free_port()
        command = [part.replace("{port}", str(port)) for part in self.peer.command]
        self.url = f"http://127.0.0.1:{port}"
        started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdout=self._log,
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
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def peak_mebibytes(self) -> int:
        """Peak resident memory of the server's process and its children, added up."""
        assert self._process is not None
        return sum(_high_water(pid) for pid in tree(self._process.pid)) // 1024

    def _first_token(self, deadline: float) -> None:
        assert self._process is not None
        prompt = list(range(300, 316))
        body = json.dumps({"model": "model", "prompt": prompt, "max_tokens": 1}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", body, headers)
        last: Exception | None = None
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self.peer.name} ended by itself:\n{self.log()[-2000:]}")
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
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()


def free_port() -> int:
    """For a server that cannot find one by itself. None of those that Linux gives to clients: one
    of these might have it before the server has."""
    for port in random.sample(range(20_000, 32_768), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
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
