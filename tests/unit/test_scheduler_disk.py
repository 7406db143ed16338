"""Blocks in files: what a sequence waits for, and what it does not."""

from __future__ import annotations

import pytest
from fakes import VOCAB_SIZE, FakeWorker, StepLoop, make_tables

from quantd.daemon.kv.cache import KvCache
from quantd.daemon.kv.disk import DiskIndex
from quantd.daemon.kv.pool import BlockPool
from quantd.daemon.scheduler.tables import BlockTables
from quantd.daemon.types import BLOCK_TOKENS, SamplingParams
from quantd.daemon.types import DiskIndex as Listing

PROMPT = [i * 7 % VOCAB_SIZE for i in range(200)]


def test_disk_survives_a_restart_and_serves_only_what_fits() -> None:
    files: dict[bytes, list[int | None]] = {}

    def fresh(revision: str = "fake") -> StepLoop:
        tables = make_tables(12, num_places=16, disk_files=64)
        assert tables.kv.disk is not None
        tables.kv.disk.open(files, 1)
        loop = StepLoop(tables=tables)
        loop.worker.files = files
        return loop

    loop = fresh()
    loop.add(0, 2, prompt=PROMPT[:100])
    loop.run()
    loop.save()
    assert len(files) == 6
    loop = fresh()
    seq = loop.add(0, 3, prompt=PROMPT[:100])
    assert seq in loop.scheduler._fetching
    loop.run()
    loop.check_outputs()
    assert (seq.num_cached_tokens, loop.kv.num_moved["in", "disk"]) == (96, 6)
    salted = loop.add(0, 3, prompt=PROMPT[:100], cache_salt="other")
    loop.run()
    assert salted.num_cached_tokens == 0


def unlisted() -> tuple[StepLoop, dict[bytes, list[int | None]]]:
    """A loop whose folder holds PROMPT[:100], and was not looked through yet; and these files."""
    source = StepLoop(tables=make_tables(12, num_places=16, disk_files=64))
    source.add(0, 2, prompt=PROMPT[:100])
    source.run()
    source.save()
    kv = KvCache(BlockPool(12), BlockPool(16), DiskIndex(64))
    loop = StepLoop(tables=BlockTables(kv, "fake"))
    loop.worker.files = dict(source.worker.files)
    return loop, source.worker.files


def test_the_first_request_waits_until_it_is_known_what_lies_on_disk() -> None:
    loop, files = unlisted()
    first = loop.add(0, 3, prompt=PROMPT[:100])
    other = loop.add(0, 3, prompt=PROMPT[100:150])
    short = loop.add(0, 3, prompt=PROMPT[: BLOCK_TOKENS - 1])
    scoring = SamplingParams(3, prompt_logprobs=0)
    scored = loop.add(0, prompt=PROMPT[50:90], sampling=scoring)
    gone = loop.add(0, 3, prompt=PROMPT[:100])
    plan = loop.begin()
    # What can have nothing there goes on meanwhile.
    assert plan is not None and [new.seq for new in plan.add] == [short.id, scored.id]
    assert loop.scheduler.num_waiting == 3
    assert dict(loop.scheduler.sequences())[first] == "fetching"
    loop.scheduler.abort(gone.id)
    loop.scheduler.check()
    loop.end()
    loop.scheduler.disk_open(Listing(tuple(files), 1))
    loop.scheduler.check()
    loop.run()
    loop.check_outputs()
    assert (first.num_cached_tokens, other.num_cached_tokens) == (96, 0)
    assert loop.kv.num_moved["in", "disk"] == 6
    assert gone.output_tokens == []


def test_lines_that_wait_for_the_disk_take_nobody_else_s_place_in_the_queue() -> None:
    loop, files = unlisted()
    lines = [loop.add(0, 3, prompt=PROMPT[:length], is_batch=True) for length in (100, 90)]
    loop.add(0, 3, prompt=PROMPT[:100])
    assert (loop.scheduler.num_waiting, loop.scheduler.num_lines_waiting) == (3, 2)
    loop.scheduler.disk_open(Listing(tuple(files), 1))
    assert all(line in loop.scheduler._fetching for line in lines)
    assert (loop.scheduler.num_waiting, loop.scheduler.num_lines_waiting) == (3, 2)
    loop.run()
    loop.check_outputs()


def test_all_that_have_waited_long_enough_go_on_in_one_plan() -> None:
    """And rank by what of them is there by then."""
    loop, _ = unlisted()
    first = loop.add(0, 3, prompt=PROMPT[:20])
    loop.clock.advance(0.5)
    second, third = (loop.add(0, 3, prompt=[i, *PROMPT[:30]]) for i in range(2))
    loop.clock.advance(0.5)
    plan = loop.begin()
    assert plan is not None and [new.seq for new in plan.add] == [first.id]
    assert loop.scheduler.wake_at() == 1.5
    loop.end()
    loop.clock.advance(0.5)
    plan = loop.begin()
    assert plan is not None and [new.seq for new in plan.add] == [second.id, third.id]
    loop.end()
    loop.run()
    loop.check_outputs()


def test_what_was_read_counts_for_the_rank_and_against_the_timeout() -> None:
    """Half of it was read when its patience ended; that half need not be computed."""
    loop = restarted()
    loop.kv.cost.computed(1000, 10.0)
    slow = loop.add(0, 1, prompt=PROMPT[:193], deadline=6.5)
    loop.begin()
    done = loop.worker.disk_done
    done, loop.worker.disk_done = done[:8], []
    for item in done:
        loop.scheduler.disk_done(item)
    loop.end()
    assert slow.num_known_blocks == 0
    loop.clock.advance(5.0)
    assert loop.begin() is not None
    assert (slow.num_known_blocks, slow.num_cached_tokens) == (8, 128)
    loop.end()
    assert loop.reasons() == {slow.id: "length"}


@pytest.mark.parametrize("is_listed", [True, False])
def test_who_waited_for_the_disk_ranks_by_what_it_brought(is_listed: bool) -> None:
    loop = restarted()
    seq = loop.add(0, 1, prompt=PROMPT[:193])
    other = loop.add(0, 1, prompt=[5, *PROMPT[:50]])
    if not is_listed:
        loop, files = unlisted()
        seq, other = (loop.add(0, 3, prompt=prompt) for prompt in (PROMPT[:100], [5, *PROMPT[:50]]))
        loop.scheduler.disk_open(Listing(tuple(files), 1))
    loop.run()
    assert (seq.num_known_blocks, other.num_known_blocks) == (12 if is_listed else 6, 0)
    loop.check_outputs()


def test_a_folder_that_takes_long_to_look_through_is_waited_for_only_so_long() -> None:
    loop, files = unlisted()
    seq = loop.add(0, 3, prompt=PROMPT[:100])
    assert loop.begin() is None and loop.scheduler.wake_at() == 1.0
    loop.clock.advance(1.0)
    loop.run()
    loop.check_outputs()
    assert (seq.num_cached_tokens, loop.scheduler.wake_at()) == (0, None)
    loop.scheduler.disk_open(Listing(tuple(files), 1))
    loop.kv.shrink()
    later = loop.add(0, 3, prompt=PROMPT[:100])
    loop.run()
    assert later.num_cached_tokens == 96


def test_a_file_that_is_gone_costs_no_answer() -> None:
    tables = make_tables(12, num_places=16, disk_files=64)
    loop = StepLoop(tables=tables)
    loop.add(0, 2, prompt=PROMPT[:100])
    loop.run()
    loop.save()
    assert tables.kv.disk is not None
    names = list(loop.worker.files)
    other = StepLoop(tables=make_tables(12, num_places=16, disk_files=64))
    other.kv.disk.open(names, 1)  # type: ignore[union-attr]
    seq = other.add(0, 3, prompt=PROMPT[:100])
    other.run()
    other.check_outputs()
    assert seq.num_cached_tokens == 0 and len(other.kv.disk) == 0  # type: ignore[arg-type]
    other.kv.host.check()  # type: ignore[union-attr]
    assert other.kv.reads.places() == set()


def test_a_full_disk_rests_and_everything_else_goes_on() -> None:
    tables = make_tables(8, num_places=8, disk_files=64)
    loop = StepLoop(tables=tables)
    loop.worker.disk_error = "OSError: no space left on device"
    for i in range(6):
        loop.add(0, 2, prompt=[*PROMPT[i * 20 : i * 20 + 100]])
        loop.run()
    loop.check_outputs()
    assert tables.kv.stats().disk_problem == "OSError: no space left on device"
    assert not loop.worker.files


def test_a_slow_disk_is_waited_for_only_so_long() -> None:
    tables = make_tables(12, num_places=16, disk_files=64)
    source = StepLoop(tables=make_tables(12, num_places=16, disk_files=64))
    source.add(0, 2, prompt=PROMPT[:100])
    source.run()
    source.save()
    tables.kv.disk.open(source.worker.files, 1)  # type: ignore[union-attr]
    loop = StepLoop(tables=tables)

    class Slow(FakeWorker):
        def _disk(self, op: object) -> None:
            pass

    loop.worker = Slow(12)
    seq = loop.add(0, 2, prompt=PROMPT[:100])
    loop.begin()  # the reads are on their way
    loop.end()
    assert loop.begin() is None
    due = loop.scheduler.wake_at()
    assert due is not None
    loop.clock.advance(due)
    loop.run()
    assert loop.reasons() == {seq.id: "length"}
    loop.check_outputs()


def restarted(num_places: int = 32) -> StepLoop:
    """The files of 192 tokens of PROMPT are there; the tree knows nothing."""
    source = StepLoop(tables=make_tables(24, num_places=32, disk_files=64))
    source.add(0, 2, prompt=PROMPT[:193])
    source.run()
    source.save()
    loop = StepLoop(tables=make_tables(64, num_places=num_places, disk_files=64))
    loop.kv.disk.open(source.worker.files, 1)  # type: ignore[union-attr]
    loop.worker.files = dict(source.worker.files)
    return loop


def num_computed(loop: StepLoop) -> int:
    return sum(chunk.stop - chunk.start for plan in loop.plans for chunk in plan.chunks)


def test_those_that_share_a_beginning_share_its_reading() -> None:
    loop = restarted()
    seqs = [loop.add(0, 1, prompt=[*PROMPT[:160], i, i, i]) for i in range(4)]
    assert all(seq in loop.scheduler._fetching for seq in seqs)
    loop.begin()
    loop.kv.check()
    loop.end()
    loop.run()
    loop.check_outputs()
    assert [seq.num_cached_tokens for seq in seqs] == [160] * 4
    assert loop.kv.num_moved["in", "disk"] == 10
    assert num_computed(loop) == 4 * 3


def test_who_goes_on_behind_what_another_reads_reads_the_rest() -> None:
    loop = restarted()
    short = loop.add(0, 1, prompt=PROMPT[:100])
    long = loop.add(0, 1, prompt=PROMPT[:193])
    other = loop.add(0, 1, prompt=[*PROMPT[:32], *PROMPT[100:150]])
    loop.run()
    loop.check_outputs()
    assert [seq.num_cached_tokens for seq in (short, long, other)] == [96, 192, 32]
    assert loop.kv.num_moved["in", "disk"] == 12


def test_who_shares_a_reading_gets_it_though_the_first_one_left() -> None:
    loop = restarted()
    first, second = (loop.add(0, 1, prompt=PROMPT[:100]) for _ in range(2))
    loop.scheduler.abort(first.id)
    loop.scheduler.check()
    loop.run()
    loop.check_outputs()
    assert (second.num_cached_tokens, loop.kv.num_moved["in", "disk"]) == (96, 6)


def test_a_shared_file_that_is_gone_costs_no_answer() -> None:
    loop = restarted()
    gone = list(loop.worker.files)[3]
    del loop.worker.files[gone]
    seqs = [loop.add(0, 1, prompt=PROMPT[:num]) for num in (100, 193)]
    loop.run()
    loop.check_outputs()
    assert loop.reasons() == {seq.id: "length" for seq in seqs}
    assert loop.kv.reads.places() == set()
    loop.kv.check()


def test_a_shared_reading_waits_for_its_own_blocks_alone() -> None:
    """The first one reads on for long; who shares only its beginning does not wait for that."""
    loop = restarted()
    loop.add(0, 1, prompt=PROMPT[:193])
    second = loop.add(0, 1, prompt=[*PROMPT[:32], *PROMPT[100:150]])
    loop.begin()
    done = loop.worker.disk_done
    done, loop.worker.disk_done = done[:2], done[2:]
    assert len(loop.worker.disk_done) == 10
    for item in done:
        loop.scheduler.disk_done(item)
    assert second not in loop.scheduler._fetching
    loop.end()
    loop.run()
    loop.check_outputs()


def test_with_few_places_all_the_same_everybody_gets_an_answer() -> None:
    loop = restarted(num_places=8)
    seqs = [loop.add(0, 1, prompt=PROMPT[:num]) for num in (193, 193, 100)]
    loop.run()
    loop.check_outputs()
    assert loop.reasons() == {seq.id: "length" for seq in seqs}
    loop.kv.check()
