from __future__ import annotations

import os
from pathlib import Path

from quantd.daemon.config import Environment


def test_empty_variables_are_not_set() -> None:
    names = ["QUANTD_CONFIG", "QUANTD_LOG", "XDG_RUNTIME_DIR", "NOTIFY_SOCKET", "WATCHDOG_USEC"]
    assert Environment.read(dict.fromkeys(names, "")) == Environment.read({})


def test_what_the_service_manager_says() -> None:
    environment = Environment.read(
        {
            "WATCHDOG_USEC": "20000000",
            "WATCHDOG_PID": str(os.getpid()),
            "NOTIFY_SOCKET": "@abstract",
            "CREDENTIALS_DIRECTORY": "/run/credentials/quantd.service",
            "JOURNAL_STREAM": "9:123",
        }
    )
    assert environment.watchdog_usec == 20_000_000
    assert environment.notify_socket == "@abstract"
    assert environment.credentials == Path("/run/credentials/quantd.service")
    assert environment.journal_stream == (9, 123)


def test_what_is_meant_for_another_process_is_not_ours() -> None:
    other = str(os.getpid() + 1)
    environment = Environment.read({"WATCHDOG_PID": other, "WATCHDOG_USEC": "1000"})
    assert environment.watchdog_usec is None


def test_the_config_home_falls_back_to_the_home_folder() -> None:
    assert Environment.read({"HOME": "/home/a"}).config_home == Path("/home/a/.config")
    both = Environment.read({"HOME": "/home/a", "XDG_CONFIG_HOME": "/c"})
    assert both.config_home == Path("/c")
    assert Environment.read({}).config_home is None
