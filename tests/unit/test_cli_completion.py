"""Completion scripts are valid and offer what the parser knows."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from quantd.daemon.cli.completion import bash, fish, read, zsh
from quantd.daemon.cli.parser import new_parser

COMMANDS = list(read(new_parser()))


def test_the_parser_is_read_in_full() -> None:
    by_name = {command.name: command for command in COMMANDS}
    expected = {"serve", "run", "ps", "load", "bench", "check", "check-config", "completion"}
    assert expected <= {*by_name}
    flags = {name: option for option in by_name["serve"].options for name in option.names}
    assert flags["--policy"].choices == ("fcfs", "priority", "sjf")
    assert flags["--port"].takes_value and not flags["--help"].takes_value
    assert by_name["completion"].words == ("bash", "zsh", "fish")
    assert all(command.help for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["l"], {"load"}),
        (["serve", "--log-"], {"--log-level", "--log-format"}),
        (["serve", "--policy", ""], {"fcfs", "priority", "sjf"}),
        (["completion", "z"], {"zsh"}),
        (["ps", "--js"], {"--json"}),
        (["check", "--qu"], {"--quick"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    line = " ".join(f"'{word}'" for word in ["quantd", *words])
    script = f"""{bash(COMMANDS)}
COMP_WORDS=({line}); COMP_CWORD={len(words)}
_quantd
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    assert {*done.stdout.split()} == expected


@pytest.mark.parametrize(("shell", "script"), [("zsh", zsh), ("fish", fish)])
def test_the_other_shells_accept_theirs(shell: str, script: object) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    text = script(COMMANDS)  # type: ignore[operator]
    done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", [zsh, fish])
def test_every_flag_is_in_each_script(script: object) -> None:
    text = script(COMMANDS)  # type: ignore[operator]
    for command in COMMANDS:
        for option in command.options:
            for name in option.names:
                assert name.lstrip("-") in text
