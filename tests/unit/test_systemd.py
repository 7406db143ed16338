"""The units: systemd itself finds nothing wrong, and they agree with the daemon's defaults."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantd.daemon.cli import install_service, main
from quantd.daemon.config import ServerSettings

UNITS = Path(__file__).parents[2] / "systemd"

needs_systemd = [
    pytest.mark.systemd,
    pytest.mark.skipif(
        shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
    ),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The system's units as `install-service` writes them."""
    assert main(["install-service", "--prefix", str(tmp_path)]) == 0
    return tmp_path / "etc"


def analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "--no-pager", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def keys(unit: Path) -> dict[str, list[str]]:
    """Key → values, in order."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", unit.read_text(), flags=re.M):
        found.setdefault(key, []).append(value)
    return found


class TestAnalyze:
    pytestmark = needs_systemd

    def test_systemd_accepts_the_units(self, root: Path) -> None:
        done = analyze("verify", root / "systemd/system/quantd.service")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        done = analyze("verify", root / "systemd/system/quantd.socket")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_systemd_accepts_the_drop_in(self, root: Path) -> None:
        folder = root / "systemd/system/quantd.service.d"
        folder.mkdir()
        shutil.copy(UNITS / "quantd-gpu.conf", folder / "gpu.conf")
        done = analyze("verify", folder.parent / "quantd.service")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_the_service_is_hardened(self, root: Path) -> None:
        unit = root / "systemd/system/quantd.service"
        done = analyze("security", "--offline=true", "--threshold=25", unit)
        assert done.returncode == 0, done.stdout

    @pytest.mark.skipif(
        shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed"
    )
    def test_the_user_can_be_made(self, root: Path) -> None:
        file = root / "sysusers.d/quantd.conf"
        done = subprocess.run(
            ["systemd-sysusers", "--dry-run", file], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_the_interpreter_is_this_one(root: Path) -> None:
    service = keys(root / "systemd/system/quantd.service")
    assert service["ExecStart"] == [f"{sys.executable} -m quantd.daemon serve"]
    home = "read-only" if install_service.is_hidden(sys.executable) else "yes"
    assert service["ProtectHome"] == [home]


def test_units_agree_with_the_defaults() -> None:
    service, socket = keys(UNITS / "quantd.service"), keys(UNITS / "quantd.socket")
    server = ServerSettings()
    assert socket["ListenStream"] == ["/run/quantd.sock", f"{server.host}:{server.port}"]
    assert int(socket["SocketMode"][0], 8) == server.socket_mode
    for unit in (service, keys(UNITS / "user/quantd.service")):
        assert int(unit["TimeoutStopSec"][0]) > server.drain_seconds
        assert unit["Type"] == ["notify"]
        assert "PYTHONSAFEPATH=1" in unit["Environment"]
    assert service["User"] == socket["SocketUser"] == ["quantd"]


def test_a_users_own_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert main(["install-service", "--user"]) == 0
    unit = tmp_path / "systemd/user/quantd.service"
    assert f"wrote {unit}" in capsys.readouterr().out
    assert keys(unit)["ExecStart"] == [f"{sys.executable} -m quantd.daemon serve"]


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["install-service", "--dry-run", "--prefix", str(tmp_path)]) == 0
    assert "ExecStart=" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "etc").write_text("")
    assert main(["install-service", "--prefix", str(tmp_path)]) == 2
    assert f"cannot write {tmp_path}/etc/systemd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "escaped"),
    [
        ("/usr/bin/python3", "/usr/bin/python3"),
        ("/opt/my venv/python", '"/opt/my venv/python"'),
        ("/opt/100%/$x", "/opt/100%%/$$x"),
    ],
)
def test_escaping(path: str, escaped: str) -> None:
    assert install_service.escape(path) == escaped
