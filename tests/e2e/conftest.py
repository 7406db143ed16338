"""Daemons for the tests."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from harness import Daemon

_SHOWN_CHARACTERS = 20_000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows what the daemons have said that are there."""
    report = yield
    if report.failed:
        for daemon in Daemon.running:
            said = daemon.said()[-_SHOWN_CHARACTERS:]
            report.sections.append((f"log of {daemon.folder.name}", said))
    return report


@pytest.fixture
def serve() -> Iterator[Callable[..., Daemon]]:
    """Start daemons; those still alive at the end of the test are stopped."""
    with ExitStack() as started:

        def start(*arguments: str, **options: Any) -> Daemon:
            return started.enter_context(Daemon(*arguments, **options))

        yield start


@pytest.fixture(scope="session")
def demo() -> Iterator[Daemon]:
    """One daemon on the embedded model in fp32, shared by the tests that leave it as it was."""
    with Daemon("demo", "--dtype", "float32", "--threads", "1") as daemon:
        yield daemon
