"""The command line without a daemon: arguments, errors, and what needs nobody to answer."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from quantd.daemon.cli import main
from quantd.daemon.cli.check_config import show
from quantd.daemon.cli.parser import model_flags, new_parser, settings_flags
from quantd.daemon.cli.screen import LastLine, bar, size, table
from quantd.daemon.cli.serve import progress_line
from quantd.daemon.config import Environment, load
from quantd.daemon.config.load import SECTIONS, flag, rules


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("QUANTD_CONFIG", "QUANTD_LOG", "QUANTD_API_KEY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config-home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def quantd(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantd.daemon", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_every_key_is_a_flag_of_serve() -> None:
    for section, struct in SECTIONS.items():
        for name in rules(struct):
            arguments = new_parser().parse_args(["serve", flag(section, name), "x"])
            assert settings_flags(arguments) == {f"{section}.{name}": "x"}
            assert model_flags(arguments) == {}


def test_model_flags() -> None:
    arguments = new_parser().parse_args(
        ["serve", "a", "b=/m", "--max-context", "9", "--keep-alive", "-1", "--port", "0"]
    )
    assert arguments.models == ["a", "b=/m"]
    assert model_flags(arguments) == {"max_context": "9", "keep_alive": "-1"}
    assert settings_flags(arguments) == {"server.port": "0"}


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        new_parser().parse_args(["serve", "--por", "1"])
    assert capsys.readouterr().err == "quantd: unrecognized arguments: --por\n"


def test_version() -> None:
    done = quantd("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("quantd 0.")


@pytest.mark.parametrize("arguments", [["serve", "--port", "99999"], ["ps", "--port", "99999"]])
def test_a_wrong_flag_is_one_line_and_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error == 'quantd: --port: server.port = "99999": must be an integer from 0 to 65535\n'


def test_no_daemon_is_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none.sock"
    assert main(["ps", "--socket", str(path)]) == 1
    error = capsys.readouterr().err
    assert error == f"quantd: no daemon is running at {path}; start one with `quantd serve`\n"


def test_a_missing_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "/nowhere/model"]) == 2
    assert "/nowhere/model: no such folder or file" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m quantd.daemon serve --help | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True)
    assert done.stderr == b""


def test_commands_that_talk_import_little() -> None:
    code = (
        "import sys; from quantd.daemon.cli import main; main(['ps', '--socket', '/nowhere']);"
        "print(*sorted({'asyncio', 'aiohttp', 'msgspec', 'structlog', 'torch'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "\n", done.stdout


# --- check-config ----------------------------------------------------------------------------

CONFIG = """\
[server]
port = 9000
allowed_origins = ["http://a", "http://b"]
socket = ""
[models."org/m"]
path = "m"
kv_bytes = "2GiB"
keep_alive = 300
aliases = ["x"]
[safety.rules."self-harm/intent"]
words = ['say "no"', 'back\\slash']
pii = ["email"]
[safety.guards.g]
model = "x"
labels = { "a label" = "hate" }
[safety.policies.p]
input = { "self-harm/intent" = "block", hate = "annotate" }
"""


def test_what_check_config_prints_means_the_same(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text(CONFIG)
    settings = load(first, environment=Environment())
    second.write_text("\n".join(show(settings)))
    assert tomllib.loads(second.read_text())
    again = load(second, environment=Environment())
    assert replace(again, file=None) == replace(settings, file=None)


def test_check_config_says_where_each_value_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.toml"
    path.write_text(CONFIG)
    assert main(["check-config", "--config", str(path)]) == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert f"port = 9000 # {path}:2" in lines
    assert 'host = "127.0.0.1" # default' in lines
    assert "socket_mode = 0o660 # default" in lines
    assert f"kv_bytes = 2147483648 # {path}:7" in lines
    assert 'max_context = "auto" # default' in lines
    assert f"{path}:6: there is nothing at {tmp_path / 'm'}" in err


def test_check_config_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.toml"
    path.write_text("\n[log]\nlevle = 'info'\n")
    assert main(["check-config", "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"quantd: {path}:3: unknown key log.levle; did you mean 'level'?\n")


def test_check_config_compiles_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.toml"
    path.write_text("[safety.rules.a]\npatterns = ['x', '(y']\n")
    assert main(["check-config", "--config", str(path)]) == 2
    message = f"quantd: {path}:2: safety.rules.a.patterns: '(y': missing ): (y\n"
    assert capsys.readouterr() == ("", message)


# --- what moves on a terminal ------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError


def test_log_lines_push_the_last_line_down() -> None:
    stream = Recorder()
    screen = LastLine(stream)  # type: ignore[arg-type]
    screen.write("one\n")
    screen.show("bar")
    screen.write("two\n")
    screen.show("")
    screen.write("three\n")
    clear = "\r\x1b[K"
    assert stream.text == f"one\n{clear}bar{clear}two\nbar{clear}three\n"


def test_the_last_line_is_cut_at_the_terminals_width() -> None:
    stream = Recorder()
    LastLine(stream).show("x" * 200)  # type: ignore[arg-type]
    assert stream.text.count("x") == 79


def test_bars_sizes_tables() -> None:
    assert bar(0) == "░" * 24 and bar(1) == "█" * 24 and bar(2) == bar(1)
    assert [size(n) for n in (0, 1023, 1536, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
    assert table([["A", "LONG"], ["bbb", "c"]]) == "A    LONG\nbbb  c"


def test_the_progress_line_shows_what_loads() -> None:
    assert progress_line([]) == ""
