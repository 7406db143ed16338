"""Daemons for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import Daemon


@pytest.fixture
def serve() -> Iterator[Callable[..., Daemon]]:
    """Start daemons; those still alive at the end of the test are stopped."""
    started: list[Daemon] = []

    def start(*arguments: str, **options: Any) -> Daemon:
        daemon = Daemon(*arguments, **options)
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        daemon.stop()


@pytest.fixture(scope="session")
def demo() -> Iterator[Daemon]:
    """One daemon on the embedded model in fp32, shared by the tests that leave it as it was."""
    daemon = Daemon("demo", "--dtype", "float32", "--threads", "1")
    yield daemon
    daemon.stop()
