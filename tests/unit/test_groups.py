"""Tests of one group run one after the other in one worker, which several rely on."""

from __future__ import annotations

import pytest


@pytest.mark.xdist_group("a group")
def test_marked_tests_are_grouped(request: pytest.FixtureRequest) -> None:
    """pytest-xdist 3.8 groups nothing with pytest 9.2, and says nothing of it."""
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("not run with --dist loadgroup")
    assert request.node.nodeid.endswith("@a group")
