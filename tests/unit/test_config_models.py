"""Which models a command line means."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantd.daemon.config import Environment, Settings, choose_models, load
from quantd.daemon.config import rules as rules_module
from quantd.daemon.errors import ConfigError


@pytest.fixture(autouse=True)
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "embedded"
    (folder / "demo").mkdir(parents=True)
    (folder / "demo/config.json").write_text("{}")
    monkeypatch.setattr(rules_module, "_EMBEDDED", folder)
    return folder


@pytest.fixture
def configured(tmp_path: Path) -> Settings:
    path = tmp_path / "config.toml"
    path.write_text("[models.a]\npath='a'\ndtype='float16'\n[models.b]\npath='b'")
    return load(path, environment=Environment(user_id=1))


def test_without_arguments_the_configured_ones(configured: Settings) -> None:
    assert choose_models(configured) is configured


def test_with_nothing_at_all_the_demo(embedded: Path) -> None:
    settings = choose_models(Settings(), flags={"dtype": "float32"})
    assert list(settings.models) == ["demo"]
    assert settings.models["demo"].path == embedded / "demo"
    assert settings.models["demo"].dtype == "float32"
    assert settings.origin["models.demo.dtype"] == "--dtype"


def test_arguments_choose(configured: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "some-model"
    folder.mkdir()
    settings = choose_models(
        configured, ["a", str(folder), f"x={folder}", "demo"], {"threads": "2"}
    )
    assert list(settings.models) == ["a", "some-model", "x", "demo"]
    assert settings.models["a"].dtype == "float16"
    assert settings.models["x"].path == folder
    assert {model.threads for model in settings.models.values()} == {2}
    assert configured.models["a"].threads is None


def test_a_relative_folder_gets_its_real_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    assert choose_models(Settings(), ["m"]).models["m"].path == tmp_path / "m"
    monkeypatch.chdir(tmp_path / "m")
    assert list(choose_models(Settings(), ["."]).models) == ["m"]


def test_errors(configured: Settings, tmp_path: Path) -> None:
    def fails(*arguments: str, **flags: str) -> str:
        with pytest.raises(ConfigError) as caught:
            choose_models(configured, arguments, flags)
        return str(caught.value)

    assert "nope: no such folder or file" in fails("nope")
    assert "(known: a, b, demo)" in fails("nope")
    assert "two models are named 'a'" in fails("a", "a")
    assert "--max-context is for models named on the command line" in fails(max_context="1")
    assert '--dtype: models.a.dtype = "int3": must be one of' in fails("a", dtype="int3")


def test_a_disk_tier_needs_a_host_tier(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[models.a]\npath = "embedded:demo"\ndisk_kv_path = "kv"\n')
    with pytest.raises(ConfigError, match=r":3: models\.a\.disk_kv_path = .*host_kv_bytes above 0"):
        load(path)
    with pytest.raises(ConfigError, match=r"--disk-kv-path: .*host_kv_bytes above 0"):
        choose_models(Settings(), ["demo"], {"disk_kv_path": str(tmp_path)})
