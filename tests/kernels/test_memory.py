"""Memory for packed weights."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from quantd.kernels.cpu import memory

SIZES = [(3, 5), (1, 2 << 20), (2, (1 << 20) - 1), (7, 1_000_003)]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_it_is_zeros_of_that_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = memory.empty_weight(shape, dtype)
    assert weight.shape == shape and weight.dtype == dtype and weight.is_contiguous()
    assert not weight.count_nonzero()
    weight.fill_(1)
    assert weight.count_nonzero() == weight.numel()


def test_a_large_one_begins_at_a_huge_page() -> None:
    assert memory.empty_weight((5 << 20,), torch.uint8).data_ptr() % (2 << 20) == 0


def test_huge_pages_are_under_it_where_the_system_gives_them() -> None:
    size = 64 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as plain:
        before = _huge_kilobytes()
        plain.madvise(mmap.MADV_HUGEPAGE)
        plain.write(b"x" * size)
        with_plain = _huge_kilobytes()
    if before is None or with_plain is None or with_plain <= before:
        pytest.skip("the system gives no huge pages, has none left, or does not say")
    before = _huge_kilobytes()
    weight = memory.empty_weight((size,), torch.uint8)
    weight.fill_(1)
    after = _huge_kilobytes()
    assert after is not None and before is not None and after > before


def test_a_system_without_them_gives_usual_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.mmap, "MADV_HUGEPAGE", 9999)  # EINVAL, as where there are none
    assert not memory.empty_weight((5 << 20,), torch.uint8).count_nonzero()


def test_it_lives_as_long_as_a_view_of_it() -> None:
    view = memory.empty_weight((5 << 20,), torch.uint8)[1 << 20 :]
    view.fill_(3)
    other = memory.empty_weight((5 << 20,), torch.uint8)
    other.fill_(4)
    assert view.eq(3).all()


def _huge_kilobytes() -> int | None:
    found = re.search(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps_rollup").read_text())
    return None if found is None else int(found[1])
