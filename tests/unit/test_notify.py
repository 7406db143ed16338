from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from quantd.daemon.notify import Notifier


@pytest.mark.parametrize("abstract", [False, True])
def test_messages(tmp_path: Path, abstract: bool) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + path if abstract else path)
        notifier = Notifier("@" + path if abstract else path)
        notifier.ready()
        notifier.status("two\nlines")
        notifier.stopping(1.5)
        notifier.watchdog()
        before = time.monotonic_ns() // 1000
        notifier.reloading()
        got = [manager.recv(4096).decode() for _ in range(5)]
        notifier.close()
    assert got[:4] == [
        "READY=1",
        "STATUS=two lines",
        "STOPPING=1\nEXTEND_TIMEOUT_USEC=1500000",
        "WATCHDOG=1",
    ]
    first, second = got[4].split("\n")
    assert first == "RELOADING=1"
    assert int(second.removeprefix("MONOTONIC_USEC=")) >= before


def test_without_a_manager_nothing_happens(tmp_path: Path) -> None:
    for address in (None, str(tmp_path / "nobody")):
        notifier = Notifier(address)
        notifier.ready()
        notifier.close()
        notifier.watchdog()
