"""The example of docs/plugins.md is the package that is tested."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOY = ROOT / "tests" / "fixtures" / "toy_plugin"


@pytest.mark.parametrize("file", ["pyproject.toml", "quantd_ternary/plugin.py"])
def test_the_page_shows_the_file_as_it_is(file: str) -> None:
    page = (ROOT / "docs" / "plugins.md").read_text()
    language = "toml" if file.endswith("toml") else "python"
    assert f"```{language}\n{(TOY / file).read_text().strip()}\n```" in page
