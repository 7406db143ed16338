"""Copy back or compute again, as measured."""

from __future__ import annotations

import pytest

from quantd.daemon.kv.cost import CostModel
from quantd.daemon.types import BLOCK_TOKENS


def model(token: float | None = None, fetch: float | None = None) -> CostModel:
    cost = CostModel()
    if token is not None:
        cost.computed(10, 10 * token)
    if fetch is not None:
        cost.copied(4, 4 * fetch)
    return cost


def test_until_both_are_known_copying_is_cheaper() -> None:
    for cost in (model(), model(token=1e-9), model(fetch=1e9)):
        assert cost.fetch_is_cheaper() and cost.read_is_cheaper()


@pytest.mark.parametrize(("fetch", "is_cheaper"), [(15.5, True), (16.0, True), (16.5, False)])
def test_a_block_is_weighed_against_its_tokens(fetch: float, is_cheaper: bool) -> None:
    cost = model(1.0, fetch)
    assert BLOCK_TOKENS == 16 and cost.fetch_is_cheaper() is is_cheaper
    assert cost.read_is_cheaper(), "nothing was read yet"


@pytest.mark.parametrize(
    ("fetch", "read", "is_cheaper"),
    [(None, 16.0, True), (None, 16.5, False), (6.0, 10.0, True), (6.0, 10.5, False)],
)
def test_from_disk_it_is_read_and_fetched(
    fetch: float | None, read: float, is_cheaper: bool
) -> None:
    cost = model(1.0, fetch)
    cost.read(read)
    assert cost.read_is_cheaper() is is_cheaper
    assert cost.fetch_is_cheaper()


def test_each_measurement_counts_for_a_tenth() -> None:
    cost = model(2.0, 4.0)
    cost.computed(10, 120.0)
    cost.copied(2, 28.0)
    cost.read(5.0)
    cost.read(15.0)
    assert (cost.token_seconds, cost.fetch_seconds, cost.read_seconds) == (3.0, 5.0, 6.0)


def test_what_says_nothing_is_passed_over() -> None:
    cost = model()
    cost.computed(0, 1.0)
    cost.computed(5, 0.0)
    cost.computed(5, -1.0)
    cost.copied(0, 1.0)
    assert (cost.token_seconds, cost.fetch_seconds) == (None, None)
    cost.computed(1, 0.5)
    cost.copied(1, 0.0)
    assert (cost.token_seconds, cost.fetch_seconds) == (0.5, 0.0)
