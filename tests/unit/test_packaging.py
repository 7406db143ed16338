"""What pyproject.toml and MANIFEST.in promise is what the folders hold."""

from __future__ import annotations

import fnmatch
import subprocess
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]
ROOMS = ("daemon", "plugins", "kernels")


def tracked() -> list[str]:
    """The repository's files, as git has them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for path in listed.stdout.split("\0") if path]


def folders_with_code() -> set[str]:
    return {
        "quantd." + ".".join(path.parent.relative_to(ROOT).parts)
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }


def test_every_folder_with_code_is_a_package_and_the_reverse() -> None:
    assert set(SETUPTOOLS["packages"]) == folders_with_code()


def test_the_list_of_packages_is_sorted_and_without_repeats() -> None:
    packages = SETUPTOOLS["packages"]
    assert packages == sorted(set(packages))


def test_every_package_has_its_init() -> None:
    missing = [
        name
        for name in SETUPTOOLS["packages"]
        if not (ROOT / Path(*name.split(".")[1:]) / "__init__.py").is_file()
    ]
    assert missing == []


def test_data_files_exist_and_all_units_are_among_them() -> None:
    listed = [name for names in SETUPTOOLS["data-files"].values() for name in names]
    found = {name: [*ROOT.glob(name)] for name in listed}
    assert [name for name, files in found.items() if not files] == []
    shipped = {path for files in found.values() for path in files}
    units = {path for path in (ROOT / "systemd").rglob("*") if path.is_file()}
    assert {path for path in units if path.suffix != ".md"} <= shipped


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        *(("console_scripts", *pair) for pair in PROJECT["project"]["scripts"].items()),
        *(
            (group, *pair)
            for group, entries in PROJECT["project"]["entry-points"].items()
            for pair in entries.items()
        ),
    ],
)
def test_entry_points_lead_somewhere(group: str, name: str, value: str) -> None:
    module, _, attribute = value.partition(":")
    path = ROOT / Path(*module.split(".")[1:]).with_suffix(".py")
    assert path.is_file()
    if group == "console_scripts":
        assert callable(EntryPoint(name, value, group).load())
    else:  # plug-ins import torch, which this folder's tests do not
        assert f"class {attribute}" in path.read_text()


def test_every_tracked_file_is_in_the_sdist() -> None:
    """As MANIFEST.in is read by setuptools; Python files of packages are in it by themselves."""
    rules = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    rules = [rule for rule in rules if rule and not rule[0].startswith("#")]
    left_out = [
        path
        for path in tracked()
        if not _is_code(path) and not _is_included(path, rules) and not _is_for_git(path)
    ]
    assert left_out == []


def _is_code(path: str) -> bool:
    name = path.rpartition("/")[2]
    return (path.split("/")[0] in ROOMS and name.endswith((".py", "py.typed"))) or path in (
        "pyproject.toml",
        "setup.py",
    )


def _is_for_git(path: str) -> bool:
    return path.rpartition("/")[2] in (".gitignore", ".gitattributes", "MANIFEST.in")


def _is_included(path: str, rules: list[list[str]]) -> bool:
    included = False
    folder, _, name = path.rpartition("/")
    for command, *arguments in rules:
        if command == "include":
            included |= path in arguments
        elif command == "recursive-include":
            inside = folder == arguments[0] or folder.startswith(arguments[0] + "/")
            included |= inside and any(fnmatch.fnmatch(name, glob) for glob in arguments[1:])
        elif command == "global-exclude":
            included &= not any(fnmatch.fnmatch(name, glob) for glob in arguments)
        elif command == "prune":
            included &= not path.startswith(arguments[0] + "/")
        else:
            raise AssertionError(f"this test does not know {command}")
    return included
