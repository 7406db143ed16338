"""What runs in the next step, and what the last step's result means."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Literal, NamedTuple

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.kv.cache import KvCache, Match
from quantd.daemon.kv.tree import TOKEN_BYTES
from quantd.daemon.scheduler.batch import Batch
from quantd.daemon.scheduler.deadlines import Deadlines, is_hopeless, why_hopeless, why_over
from quantd.daemon.scheduler.division import Division
from quantd.daemon.scheduler.fetching import FetchQueue
from quantd.daemon.scheduler.pace import StartPace
from quantd.daemon.scheduler.places import Places
from quantd.daemon.scheduler.policy import make_policy
from quantd.daemon.scheduler.queues import Queues
from quantd.daemon.scheduler.sequence import Phase, Sequence, blocks_for
from quantd.daemon.scheduler.tables import BlockTables
from quantd.daemon.scheduler.updates import SequenceUpdate, finish_reason, keep_prompt_logprobs
from quantd.daemon.types import (
    BLOCK_TOKENS,
    Chunk,
    DiskDone,
    DiskIndex,
    FinishReason,
    NewSequence,
    Sampled,
    StepPlan,
    StepResult,
    TokenLogprob,
)

PreemptionReason = Literal["memory", "priority"]
"""The blocks ran out, or one that goes first took the place."""
PREEMPTION_REASONS: tuple[PreemptionReason, ...] = ("memory", "priority")


class _Flight(NamedTuple):
    """A plan that was handed out, with whom its chunks belong to, and which of its stays each is
    for. Two lists: pairs would be work for Python's collector in every step."""

    plan: StepPlan
    seqs: list[Sequence]
    stays: list[int]


class Scheduler:
    """Owns the sequences of one model, from `add` to their last update.

    The step loop calls `plan`, has the worker execute it, and calls `commit` with the result, in
    order. With `overlap` one plan may be made while the one before is in flight: it goes on
    from tokens that are not known yet, and what it computes for a sequence that turns out to have
    ended is dropped. `add` and `abort` may be called at any moment; the blocks of a sequence that
    leaves are free at once, because the worker executes plans in order. Everything runs on the
    event loop and nothing waits.

    Blocks are given from the front of the batch and taken from the back, therefore the first one
    always gets on, and whatever is preempted is not yet part of the plan being made: nothing ever
    has to be taken out of it again.

    Lines of batches (`Request.is_batch`) have a queue of their own. One starts when nobody else
    waits, or has waited `aging_seconds`; then it keeps its place, else whoever else comes takes it.
    While others run, lines get a tenth of what those compute (`BatchShare`).
    """

    def __init__(
        self,
        tables: BlockTables,
        settings: SchedulerSettings,
        max_context: int,
        whole: bool = False,
    ) -> None:
        """`max_context`: most tokens of one sequence, prompt and output together. whole: a prompt
        is computed in one step or not yet; nothing may come between that and its end."""
        self._tables = tables
        self._kv = tables.kv
        self._settings = settings
        self._max_context = max_context
        self._policy = make_policy(settings)
        self._queues = Queues(self._policy, settings)
        self._batch = Batch(self._policy, settings)
        self._places = Places(self._policy, self._queues, self._batch, tables)
        self._division = Division(tables, settings.token_budget, whole)
        self._fetching = FetchQueue(self._kv)
        self._deadlines = Deadlines()
        self._pace = StartPace()
        self._sequences: dict[int, Sequence] = {}  # waiting, fetching and running
        self._drops: list[int] = []
        self._step = 0
        self._in_flight: deque[_Flight] = deque()
        self._ended: list[SequenceUpdate] = []
        self._num_preemptions: dict[str, int] = dict.fromkeys(PREEMPTION_REASONS, 0)

    # --- what the engine asks ----------------------------------------------------------------

    @property
    def settings(self) -> SchedulerSettings:
        return self._settings

    @property
    def kv(self) -> KvCache:
        return self._kv

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        return len(self._batch)

    @property
    def num_waiting(self) -> int:
        """With lines of batches, and those that wait for blocks from disk."""
        return len(self._queues) + len(self._fetching)

    @property
    def num_lines_waiting(self) -> int:
        """Lines of batches among them."""
        return self._queues.num_lines + self._fetching.num_lines

    @property
    def may_plan(self) -> bool:
        """As many plans may be in flight at once as `overlap` says."""
        return len(self._in_flight) < 1 + self._settings.overlap

    @property
    def preemptions(self) -> Mapping[str, int]:
        """Since the start, by reason; every reason is there."""
        return dict(self._num_preemptions)

    def sequences(self) -> list[tuple[Sequence, str]]:
        """All that have not ended, with what each is doing."""
        return [(seq, self._doing(seq)) for seq in self._sequences.values()]

    def seconds_per_start(self, now: float) -> float:
        """How long, by the recent pace, until one place in the queue becomes free."""
        return self._pace.seconds_per_start(now)

    def wake_at(self) -> float | None:
        """When `plan` may have something to do though nothing happens; None: never."""
        return self._fetching.next_due()

    def _doing(self, seq: Sequence) -> str:
        if seq.phase is Phase.RUNNING:
            return "prefill" if seq.num_computed_tokens + 1 < len(seq.tokens) else "decode"
        return "fetching" if seq in self._fetching else "waiting"

    # --- sequences come and go ---------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Take in a new sequence, which admission has found to fit the pool alone."""
        assert seq.id not in self._sequences and seq.phase is Phase.WAITING
        assert self._most_blocks(seq) <= self._kv.pool.limit, "admission let pass what never fits"
        if not self.num_waiting:
            self._pace.waits_from(seq.waiting_since)
        self._sequences[seq.id] = seq
        self._queues.of(seq).shares.enter(seq.request.caller)
        self._deadlines.add(seq)
        self._tables.enter(seq)
        if not self._fetching.begin(seq):
            self._queues.of(seq).add(seq)

    def abort(self, seq_id: int) -> bool:
        """Forget a sequence; there will be no further update of it. False if it is unknown."""
        seq = self._sequences.get(seq_id)
        if seq is None:
            return False
        if seq.phase is Phase.RUNNING:
            self._batch.remove(seq)
        self._forget(seq)
        return True

    def disk_open(self, index: DiskIndex) -> None:
        """The worker has looked through the folder; who waited for that goes on."""
        disk = self._kv.disk
        assert disk is not None
        disk.open(index.keys, index.file_bytes)
        for seq in self._fetching.listed():
            self._go_on(seq)

    def disk_done(self, done: DiskDone) -> None:
        """A file was written or read; sequences that waited for it go on with the next plan."""
        for job in self._kv.disk_done(done):
            seq = self._fetching.done(job)
            if seq is not None:
                self._go_on(seq)

    def _go_on(self, seq: Sequence) -> None:
        """It waits for its turn, by what is known of it now."""
        self._tables.look(seq)
        self._queues.of(seq).add(seq)

    def resize(self, num_blocks: int) -> None:
        """The pool's budget, at any time. What can never fit any more ends with an error."""
        self._kv.resize(num_blocks)
        for seq in list(self._sequences.values()):
            needed = self._most_blocks(seq)
            if needed > self._kv.pool.limit:
                self._end(
                    seq,
                    "error",
                    f"the KV pool was made smaller: the request needs up to {needed} blocks, and "
                    f"there are {self._kv.pool.limit}",
                )

    def take_ended(self) -> list[SequenceUpdate]:
        """Those that have ended without a step: their time was over, or the pool became too small.
        To be called after each `plan` and `resize`."""
        ended, self._ended = self._ended, []
        return ended

    def _most_blocks(self, seq: Sequence) -> int:
        longest = min(seq.num_prompt_tokens + seq.request.sampling.max_tokens, self._max_context)
        # The last token is sampled and never computed.
        return self._kv.window.cost(blocks_for(longest - 1))

    def _end(self, seq: Sequence, reason: FinishReason, error: str) -> None:
        if seq.phase is Phase.RUNNING:
            self._batch.remove(seq)
        self._forget(seq)
        self._ended.append(SequenceUpdate(seq, finish_reason=reason, error=error))

    def _forget(self, seq: Sequence, *, spoilt: bool = False) -> None:
        """The last of a sequence, which is not in the list of running ones any more."""
        if seq.phase is Phase.RUNNING:
            self._take_off(seq, spoilt=spoilt)
        elif not self._fetching.remove(seq):
            self._queues.of(seq).remove(seq)
        seq.phase = Phase.FINISHED
        del self._sequences[seq.id]
        self._deadlines.remove(seq)
        self._queues.of(seq).shares.leave(seq.request.caller)
        self._tables.leave(seq)

    # --- a step ------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next step, which the caller must execute and `commit`; None if there is nothing to do
        before a plan in flight is committed, or at all.

        Drops never make a plan of their own: they ride with the next one, and until then the
        worker remembers no more sequences than its last steps had.
        """
        assert self.may_plan, "the last plan was not committed"
        self._kv.step = self._step + 1
        for seq in self._deadlines.due(now):
            self._end(seq, "timeout", why_over(seq))
        for seq in self._fetching.overdue(now):
            self._go_on(seq)
        self._start_waiting(now)
        going = self._going()
        sizes = self._division.sizes(going)
        chunks = self._place([seq for seq in going if sizes[seq]], sizes, now)
        held = {seq: left for seq, left in going.items() if seq.phase is Phase.RUNNING}
        if held and not chunks:
            # Nobody else gets on, so those lines do that made way.
            held = {seq: left for seq, left in held.items() if not sizes[seq]}
            chunks = self._place([*held], self._division.sizes(held), now)
        if not chunks and not self._kv.has_orders:
            return None
        self._step += 1
        drops, self._drops = tuple(self._drops), []
        seqs = [self._sequences[chunk.seq] for chunk in chunks]
        plan = StepPlan(
            step=self._step,
            chunks=tuple(chunks),
            rebinds=self._tables.take_rebinds(),
            add=self._introduce(chunks),
            drop=drops,
            copies=self._kv.take_copies(),
            disk=self._kv.take_disk_ops(),
        )
        self._in_flight.append(_Flight(plan, seqs, [seq.stay for seq in seqs]))
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[SequenceUpdate]:
        """Apply a plan's result; the updates, in the plan's order.

        Results of sequences that have ended or left the batch meanwhile are passed over.
        """
        flight = self._in_flight.popleft()
        assert plan is flight.plan and result.step == plan.step
        num_tokens = sum(chunk.stop - chunk.start for chunk in plan.chunks)
        self._kv.done(result, num_tokens, len(result.sampled))
        for part in result.prompt_logprobs:
            seq_of_part = self._sequences.get(part.seq)
            if seq_of_part is not None:
                keep_prompt_logprobs(seq_of_part, part)
        updates = []
        sampled = iter(result.sampled)
        for chunk, seq, stay in zip(plan.chunks, flight.seqs, flight.stays, strict=True):
            item = next(sampled) if chunk.sample else None
            if seq.stay != stay:
                continue  # it has ended, or left the batch
            seq.num_chunks -= 1
            seq.num_computed_tokens = chunk.stop if seq.num_chunks else seq.num_scheduled_tokens
            if item is not None:
                seq.num_pending -= 1
                updates.append(self._take_token(seq, item, now))
            if seq.phase is Phase.RUNNING:
                self._tables.publish(seq, merge=True)
        if any(update.finish_reason is not None for update in updates):
            self._batch.sweep()
        return updates

    # --- planning ----------------------------------------------------------------------------

    def _start_waiting(self, now: float) -> None:
        """Move sequences from the queue into the batch: the overdue first, then by the policy.

        It ends at the first that does not fit: what is smaller and behind may not overtake, or
        what is large would wait for ever.
        """
        places, batch = self._places, self._batch
        room: int | None = None
        while (first := self._queues.first()) is not None:
            if batch.is_full and not places.may_displace(first, batch.last):
                return
            if room is None:
                room = self._tables.room(batch)
            overdue = self._overdue(now)
            seq = overdue if overdue is not None else first
            match = self._tables.match(seq)
            if is_hopeless(seq, match.num_blocks, now, self._kv.cost.token_seconds):
                self._end(seq, "timeout", why_hopeless(seq))
                continue
            if not places.fits(seq, match, room):
                more = self._tables.needed(seq, match) + len(batch) - room
                self._tables.trim(batch, self._kv.num_available + more)
                room, match = self._tables.room(batch), self._tables.match(seq)
            if not places.fits(seq, match, room):
                seq = first
                reserved = places.kept_for(overdue, room)
                if not self._displace_for(seq, room - reserved, now):
                    return
                room, match = self._tables.room(batch), self._tables.match(seq)
                if not places.fits(seq, match, room):
                    return
            seq.aged = seq.aged or seq is overdue
            room -= self._tables.needed(seq, match)
            self._start(seq, match, now)

    def _overdue(self, now: float) -> Sequence | None:
        """Who has waited too long and may start out of turn."""
        others, lines = self._batch.room_for_aged()
        return self._queues.first_overdue(now, others=others, lines=lines)

    def _displace_for(self, seq: Sequence, room: int, now: float) -> bool:
        """Preempt just as many running sequences as `seq` needs and may displace; False if that
        would not do, and then nobody was preempted."""
        count = self._places.num_victims(seq, self._tables.match(seq), room)
        for _ in range(count):
            self._preempt_last("priority", now)
        return count > 0

    def _start(self, seq: Sequence, match: Match, now: float) -> None:
        self._queues.of(seq).remove(seq)
        self._tables.start(seq, match)
        seq.phase = Phase.RUNNING
        seq.seconds_waited += now - seq.waiting_since
        if seq.started_at is None:
            seq.started_at = now
            self._pace.started(now)
        self._batch.add(seq)

    def _left(self, seq: Sequence) -> int:
        """Tokens it has to compute; 0 as well if it is certain to end with a token in flight."""
        expected = seq.num_expected_tokens
        if seq.num_pending:
            num_output = expected - seq.num_prompt_tokens
            if num_output >= seq.request.sampling.max_tokens or expected >= self._max_context:
                return 0
        return expected - seq.num_scheduled_tokens

    def _going(self) -> dict[Sequence, int]:
        """Who could compute something, and how much at most."""
        going = {}
        for seq in self._batch:
            left = self._left(seq)
            if left > 1:
                self._tables.adopt(seq)
                left = self._left(seq)
            if left:
                going[seq] = left
        return going

    def _place(
        self, going: list[Sequence], sizes: Mapping[Sequence, int], now: float
    ) -> list[Chunk]:
        """Give blocks and a chunk of up to its size to each of `going`, from the front.

        Where blocks run out the last one is preempted, if the sequence cannot get on else. The
        last itself just sits the step out: it may go on once others have finished.
        """
        chunks = []
        for seq in going:
            if seq.phase is not Phase.RUNNING:
                continue  # preempted just now
            self._tables.adopt(seq)
            chunk = self._schedule(seq, sizes[seq])
            while chunk is None and self._batch.last is not seq:
                self._preempt_last("memory", now)
                chunk = self._schedule(seq, sizes[seq])
            if chunk is not None:
                chunks.append(chunk)
        return chunks

    def _schedule(self, seq: Sequence, size: int) -> Chunk | None:
        """None: there is no block for even one token."""
        start, expected = seq.num_scheduled_tokens, seq.num_expected_tokens
        stop = min(expected, start + size)
        if stop > len(seq.blocks) * BLOCK_TOKENS:
            self._tables.trim(self._batch, blocks_for(stop) - len(seq.blocks))
            stop = min(stop, start + self._tables.room_for(seq))
        if stop <= start:
            return None
        if stop < expected and stop % BLOCK_TOKENS <= (stop - start) // 8:
            stop -= stop % BLOCK_TOKENS  # whole blocks can be taken over from others next time
        if not self._tables.extend(seq, stop):
            return None
        self._queues.charge(seq, stop - start)
        seq.num_chunks += 1
        if stop == expected:
            seq.num_pending += 1
        new, seq.num_told_blocks = seq.blocks[seq.num_told_blocks :], len(seq.blocks)
        return Chunk(seq.id, start, stop, tuple(new), stop == expected)

    def _introduce(self, chunks: list[Chunk]) -> tuple[NewSequence, ...]:
        """What the worker must be told of sequences that it does not know or no longer knows."""
        added = []
        for chunk in chunks:
            seq = self._sequences[chunk.seq]
            if not seq.on_worker:
                seq.on_worker = True
                request = seq.request
                added.append(
                    NewSequence(
                        seq.id,
                        tuple(seq.tokens),
                        len(request.prompt),
                        request.sampling,
                        request.second,
                    )
                )
        return tuple(added)

    def _preempt_last(self, reason: PreemptionReason, now: float) -> None:
        """Back to the queue goes the last of the batch, with its tokens and without its blocks."""
        seq = self._batch.pop()
        self._take_off(seq)
        seq.phase = Phase.WAITING
        seq.num_preemptions += 1
        self._num_preemptions[reason] += 1
        seq.waiting_since = now
        self._go_on(seq)

    def _take_off(self, seq: Sequence, *, spoilt: bool = False) -> None:
        """Free the blocks of a sequence that leaves the batch, and have the worker forget it."""
        self._tables.release(seq, spoilt=spoilt)
        if seq.on_worker:
            seq.on_worker = False
            self._drops.append(seq.id)

    # --- committing --------------------------------------------------------------------------

    def _take_token(self, seq: Sequence, item: Sampled, now: float) -> SequenceUpdate:
        assert item.seq == seq.id, "the worker answered for another sequence"
        if item.error is not None:
            self._finish(seq, now, spoilt=True)
            why: FinishReason = "excluded" if item.is_excluded else "error"
            return SequenceUpdate(seq, finish_reason=why, error=item.error)
        prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        if seq.first_token_at is None:
            seq.first_token_at = now
            prompt_logprobs = tuple(seq.prompt_logprobs)
        seq.append(item.token)
        reason = finish_reason(seq, item, self._max_context)
        if reason is not None:
            self._finish(seq, now)
            self._policy.finished(seq)
        return SequenceUpdate(
            seq,
            tokens=(item.token,),
            logprobs=() if item.logprob is None else (item.logprob,),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            complete=item.complete and item.token not in seq.stop_token_ids,
        )

    def _finish(self, seq: Sequence, now: float, *, spoilt: bool = False) -> None:
        """End a running sequence; `commit` takes it out of the batch."""
        self._forget(seq, spoilt=spoilt)
        seq.finished_at = now

    # --- the invariants ----------------------------------------------------------------------

    def check_counts(self) -> None:
        """The cheap part of `check`, for a daemon at rest: O(running)."""
        self._kv.pool.check_counts()
        assert len(self._sequences) == len(self._batch) + self.num_waiting
        assert len(self._batch) or self._kv.pool.num_used == 0, "a block is used by no sequence"

    def check(self) -> None:
        """Recount everything from scratch; AssertionError where a number does not hold."""
        self.check_counts()
        self._queues.check()
        self._batch.check()
        self._tables.check(self._batch)
        running = {seq.id for seq in self._batch}
        for seq in self._sequences.values():
            assert (seq.phase is Phase.RUNNING) == (seq.id in running)
            assert 0 <= seq.num_computed_tokens <= seq.num_scheduled_tokens
            assert seq.num_scheduled_tokens <= seq.num_expected_tokens
            assert len(seq.key) == len(seq.tokens) * TOKEN_BYTES
            assert 0 <= seq.num_pending <= len(self._in_flight)
            assert seq.num_scheduled_tokens == 0 or seq.phase is Phase.RUNNING
            assert not seq.on_worker or seq.phase is Phase.RUNNING
            if not self._in_flight:
                assert seq.num_computed_tokens == seq.num_scheduled_tokens
