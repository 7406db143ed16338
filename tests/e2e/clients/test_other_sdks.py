"""SDKs that need a process of their own: the former generation in Python, and JavaScript."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from harness import checked_output

pytestmark = pytest.mark.xdist_group("clients")

HERE = Path(__file__).parent
FORMER = Path(sys.prefix) / "openai2"
JS = HERE / "js"


@pytest.mark.timeout(1800)  # three suites in one, and the machine may be busy
@pytest.mark.skipif(not FORMER.is_dir(), reason=f"no {FORMER}; `make test` makes it")
def test_former_openai(environment: dict[str, str]) -> None:
    """The suites of the present generation, word for word."""
    path = os.pathsep.join([str(FORMER), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    suites = [str(HERE / f"test_openai_{name}.py") for name in ("sdk", "tools", "responses")]
    root = HERE.parents[2]
    which = [sys.executable, "-c", "import openai; print(openai.__version__)"]
    assert checked_output(which, environment | {"PYTHONPATH": path}, root).startswith("2.")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suites]
    output = checked_output(command, environment | {"PYTHONPATH": path}, root, 1740)
    assert " passed" in output and "skipped" not in output, output


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(
    not (JS / "node_modules").is_dir(), reason=f"no {JS}/node_modules; `make test` makes it"
)
@pytest.mark.parametrize("suite", ["openai", "anthropic", "ai_sdk", "ollama"])
def test_javascript(environment: dict[str, str], suite: str) -> None:
    command = ["node", "--test", "--test-reporter=tap", f"{suite}.test.mjs"]
    output = checked_output(command, environment, JS)
    assert re.search(r"^# pass [1-9]", output, re.MULTILINE), output
