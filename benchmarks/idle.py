"""What quantd costs before and between requests: time to /health, memory and CPU at rest.

python benchmarks/idle.py                    # without a model, and with the embedded one
python benchmarks/idle.py --seconds 60 --json results/idle.json
"""

from __future__ import annotations

import argparse
import datetime
import http.client
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

_ADDRESS = re.compile(rb"http://127\.0\.0\.1:(\d+)")


class Daemon:
    """`quantd serve` with the embedded model or another, loaded or not, as a process; a context."""

    def __init__(self, preload: bool, model: str = "embedded:demo") -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        self._log = folder / "log"
        table = f'[models.demo]\npath = "{model}"\npreload = {str(preload).lower()}\n'
        (folder / "config.toml").write_text(table)
        self._command = [sys.executable, "-m", "quantd.daemon", "serve"]
        self._command += ["--config", str(folder / "config.toml"), "--port", "0"]
        self._command += [
            "--socket",
            str(folder / "quantd.sock"),
            "--store-path",
            str(folder / "state"),
        ]

    def __enter__(self) -> Daemon:
        self.started = time.monotonic()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        while not (found := _ADDRESS.search(self._log.read_bytes())):
            if self.process.poll() is not None:
                raise RuntimeError(self._log.read_text())
            time.sleep(0.002)
        self.port = int(found[1])
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        self._folder.cleanup()

    def wait_for(self, path: str) -> float:
        """Seconds from the process's start until `path` answers 200."""
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            try:
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return time.monotonic() - self.started
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.002)

    def resident_mebibytes(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def cpu_seconds(self) -> float:
        """User and system time of the daemon and its workers."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return sum(_cpu_seconds(int(p)) for p in [pid, *children])


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def at_rest(preload: bool, seconds: float) -> dict[str, Any]:
    """Start, wait until ready, then watch for `seconds`."""
    with Daemon(preload) as daemon:
        health = daemon.wait_for("/health")
        ready = daemon.wait_for("/ready")
        time.sleep(1)
        before = daemon.cpu_seconds()
        time.sleep(seconds)
        used = daemon.cpu_seconds() - before
        return {
            "health_s": health,
            "ready_s": ready,
            "resident_mib": daemon.resident_mebibytes(),
            f"cpu_s_in_{seconds:g}_s": used,
        }


def time_to_health(rounds: int) -> list[float]:
    """Process start to the first answer of /health, without a model."""
    times = []
    for _ in range(rounds):
        with Daemon(preload=False) as daemon:
            times.append(daemon.wait_for("/health"))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    times = time_to_health(arguments.rounds)
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "health_s": {"median": statistics.median(times), "min": min(times), "max": max(times)},
    }
    print("process start to /health, s:", record["health_s"])
    for name, preload in (("without a model", False), ("with one", True)):
        record[name] = at_rest(preload, arguments.seconds)
        print(f"{name}:", record[name], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
