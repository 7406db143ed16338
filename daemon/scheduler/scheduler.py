"""What runs in the next step, and what the last step's result means."""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Mapping
from typing import Literal, NamedTuple

import msgspec

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.kv.pool import BlockPool
from quantd.daemon.scheduler.pace import StartPace
from quantd.daemon.scheduler.policy import Key, make_policy
from quantd.daemon.scheduler.ready import ReadyQueue
from quantd.daemon.scheduler.sequence import Phase, Sequence, blocks_for
from quantd.daemon.scheduler.share import share_budget
from quantd.daemon.types import (
    BLOCK_TOKENS,
    Chunk,
    FinishReason,
    NewSequence,
    PromptLogprobs,
    Sampled,
    StepPlan,
    StepResult,
    TokenLogprob,
)

PreemptionReason = Literal["memory", "priority"]
"""The blocks ran out, or one that goes first took the place."""
PREEMPTION_REASONS: tuple[PreemptionReason, ...] = ("memory", "priority")


class SequenceUpdate(msgspec.Struct, frozen=True):
    """What one step brought to one sequence: a token, or its end by an error."""

    seq: Sequence
    tokens: tuple[int, ...] = ()
    """In order. A stop token that ended the sequence is the last of them, and counts as output;
    finish_reason "stop" means just that, so whoever makes text leaves the last token out."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One per token when asked for, else empty."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """In the sequence's first update only, one per prompt token, when asked for."""
    finish_reason: FinishReason | None = None
    error: str | None = None


class Counts(NamedTuple):
    running: int
    waiting: int
    blocks_free: int
    blocks_used: int
    preemptions: Mapping[str, int]
    """Since the start, by reason; every reason is there."""


class Scheduler:
    """Owns the sequences of one model, from `add` to their last update.

    The step loop calls `plan`, has the worker execute it, and calls `commit` with the result; one
    plan is in flight at a time. `add` and `abort` may be called at any moment, also in between:
    an aborted sequence's blocks are free at once, because the worker executes plans in order.
    Everything runs on the event loop and nothing waits.

    Running sequences stand in the order in which they keep their place (`Policy.keep_key`, aged
    ones first), which is fixed while they run. Blocks are given from the front and taken from the
    back, therefore the first one always gets on, and whatever is preempted is not yet part of the
    plan being made: nothing ever has to be taken out of it again.

    A sequence is started only if all of its known tokens fit beside those of the running ones,
    with one block more for each of these. So only growth by decoding preempts, not prefill, and a
    preempted sequence does not come back just to be preempted again.
    """

    def __init__(self, pool: BlockPool, settings: SchedulerSettings, max_context: int) -> None:
        """`max_context`: most tokens of one sequence, prompt and output together."""
        self._pool = pool
        self._settings = settings
        self._max_context = max_context
        # Each running sequence needs a token of every step's budget.
        self._max_running = min(settings.max_running, settings.token_budget)
        self._policy = make_policy(settings)
        self._max_aged = math.ceil(self._policy.aged_share * self._max_running)
        self._ready = ReadyQueue(self._policy, settings.aging_seconds)
        self._pace = StartPace()
        self._sequences: dict[int, Sequence] = {}  # waiting and running
        self._running: list[Sequence] = []
        self._drops: list[int] = []
        self._step = 0
        self._in_flight: StepPlan | None = None
        self._num_preemptions: dict[str, int] = dict.fromkeys(PREEMPTION_REASONS, 0)

    # --- what the engine asks ----------------------------------------------------------------

    @property
    def settings(self) -> SchedulerSettings:
        return self._settings

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def num_waiting(self) -> int:
        return len(self._ready)

    def counts(self) -> Counts:
        return Counts(
            running=len(self._running),
            waiting=len(self._ready),
            blocks_free=self._pool.num_free,
            blocks_used=self._pool.num_used,
            preemptions=dict(self._num_preemptions),
        )

    def seconds_per_start(self, now: float) -> float:
        """How long, by the recent pace, until one place in the queue becomes free."""
        return self._pace.seconds_per_start(now)

    # --- sequences come and go ---------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Take in a new sequence, which admission has found to fit the pool alone."""
        assert seq.id not in self._sequences and seq.phase is Phase.WAITING
        longest = min(seq.num_prompt_tokens + seq.request.sampling.max_tokens, self._max_context)
        # The last token is sampled and never computed.
        assert blocks_for(longest - 1) <= self._pool.num_blocks, (
            "admission let pass what never fits"
        )
        if not self._ready:
            self._pace.waits_from(seq.waiting_since)
        self._sequences[seq.id] = seq
        self._ready.add(seq)

    def abort(self, seq_id: int) -> bool:
        """Forget a sequence; there will be no further update of it. False if it is unknown."""
        seq = self._sequences.pop(seq_id, None)
        if seq is None:
            return False
        if seq.phase is Phase.WAITING:
            self._ready.remove(seq)
        else:
            self._running.remove(seq)
            self._take_off(seq)
        seq.phase = Phase.FINISHED
        return True

    # --- a step ------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next step, which the caller must execute and `commit`; None if there is no work.

        Drops never make a plan of their own: they ride with the next one, and until then the
        worker remembers no more sequences than its last step had.
        """
        assert self._in_flight is None, "the last plan was not committed"
        self._start_waiting(now)
        if not self._running:
            return None
        left = [len(seq.tokens) - seq.num_scheduled_tokens for seq in self._running]
        chunks = self._place(share_budget(self._settings.token_budget, left), now)
        assert chunks, "the first in the batch always gets on"
        self._step += 1
        drops, self._drops = tuple(self._drops), []
        self._in_flight = StepPlan(
            step=self._step, chunks=tuple(chunks), add=self._introduce(chunks), drop=drops
        )
        return self._in_flight

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[SequenceUpdate]:
        """Apply a plan's result; the updates, in the plan's order.

        Results of sequences that were aborted meanwhile are passed over.
        """
        assert plan is self._in_flight and result.step == plan.step
        self._in_flight = None
        for part in result.prompt_logprobs:
            self._keep_prompt_logprobs(part)
        updates = []
        sampled = iter(result.sampled)
        for chunk in plan.chunks:
            item = next(sampled) if chunk.sample else None
            seq = self._sequences.get(chunk.seq)
            if seq is None:
                continue
            seq.num_computed_tokens = chunk.stop
            if item is not None:
                updates.append(self._take_token(seq, item, now))
        if any(update.finish_reason is not None for update in updates):
            self._running = [seq for seq in self._running if seq.phase is Phase.RUNNING]
        return updates

    # --- planning ----------------------------------------------------------------------------

    def _start_waiting(self, now: float) -> None:
        """Move sequences from the queue into the batch: the overdue first, then by the policy.

        It ends at the first that does not fit: what is smaller and behind may not overtake, or
        what is large would wait for ever.
        """
        if not self._ready:
            return
        # Blocks that no running sequence's known tokens lay claim to; may be below zero.
        room = self._pool.num_free - sum(seq.num_missing_blocks for seq in self._running)
        num_aged = sum(seq.aged for seq in self._running)
        while (first := self._ready.first()) is not None:
            overdue = self._ready.first_overdue(now) if num_aged < self._max_aged else None
            seq = overdue if overdue is not None else first
            if not self._fits(seq, room, len(self._running)):
                seq = first
                gained = self._displace_for(seq, room - self._kept_for(overdue, room), now)
                if gained is None:
                    return
                room += gained
            seq.aged = seq.aged or seq is overdue
            num_aged += seq.aged
            room -= blocks_for(len(seq.tokens))
            self._start(seq, now)

    def _fits(self, seq: Sequence, room: int, num_running: int) -> bool:
        return (
            num_running < self._max_running
            and room - blocks_for(len(seq.tokens)) >= num_running  # a block more for each of them
        )

    def _kept_for(self, overdue: Sequence | None, room: int) -> int:
        """What of `room` those that displace may not use: it is waited for by an overdue one."""
        if overdue is None or overdue is self._ready.first():
            return 0
        return min(blocks_for(len(overdue.tokens)), max(0, room - len(self._running)))

    def _displace_for(self, seq: Sequence, room: int, now: float) -> int | None:
        """Preempt just as many running sequences as `seq` needs and may displace.

        Returns the room gained; None if that would not do, and then nobody was preempted.
        """
        gained = 0
        for count, victim in enumerate(reversed(self._running), start=1):
            if victim.aged or not self._policy.displaces(seq, victim):
                return None
            gained += blocks_for(len(victim.tokens))
            if self._fits(seq, room + gained, len(self._running) - count):
                for _ in range(count):
                    self._preempt_last("priority", now)
                return gained
        return None

    def _start(self, seq: Sequence, now: float) -> None:
        self._ready.remove(seq)
        seq.phase = Phase.RUNNING
        seq.seconds_waited += now - seq.waiting_since
        if seq.started_at is None:
            seq.started_at = now
            self._pace.started(now)
        insort(self._running, seq, key=self._keep_key)

    def _keep_key(self, seq: Sequence) -> Key:
        return (not seq.aged, *self._policy.keep_key(seq))

    def _place(self, sizes: list[int], now: float) -> list[Chunk]:
        """Give blocks and a chunk of up to sizes[i] tokens to running sequence i, from the front.

        Where blocks run out the last one is preempted, if the sequence cannot get on else. The
        last itself just sits the step out: it may go on once others have finished.
        """
        chunks = []
        for i, size in enumerate(sizes):
            if i == len(self._running):
                break  # the rest was preempted
            seq = self._running[i]
            room = self._room_for(seq)
            while room <= 0 and self._running[-1] is not seq:
                self._preempt_last("memory", now)
                room = self._room_for(seq)
            if room > 0:
                chunks.append(self._schedule(seq, min(size, room)))
        return chunks

    def _room_for(self, seq: Sequence) -> int:
        """Tokens that can be scheduled for `seq` with its own blocks and the free ones."""
        num_blocks = len(seq.blocks) + self._pool.num_free
        return num_blocks * BLOCK_TOKENS - seq.num_scheduled_tokens

    def _schedule(self, seq: Sequence, size: int) -> Chunk:
        start = seq.num_scheduled_tokens
        stop = start + size
        blocks = self._pool.allocate(blocks_for(stop) - len(seq.blocks))
        assert blocks is not None
        seq.blocks.extend(blocks)
        seq.num_scheduled_tokens = stop
        return Chunk(seq.id, start, stop, tuple(blocks), stop == len(seq.tokens))

    def _introduce(self, chunks: list[Chunk]) -> tuple[NewSequence, ...]:
        """What the worker must be told of sequences that it does not know or no longer knows."""
        added = []
        for chunk in chunks:
            seq = self._sequences[chunk.seq]
            if not seq.on_worker:
                seq.on_worker = True
                request = seq.request
                added.append(
                    NewSequence(seq.id, tuple(seq.tokens), len(request.prompt), request.sampling)
                )
        return tuple(added)

    def _preempt_last(self, reason: PreemptionReason, now: float) -> None:
        """Back to the queue goes the last of the batch, with its tokens and without its blocks."""
        seq = self._running.pop()
        self._take_off(seq)
        seq.phase = Phase.WAITING
        seq.num_computed_tokens = seq.num_scheduled_tokens = 0
        seq.num_preemptions += 1
        self._num_preemptions[reason] += 1
        seq.waiting_since = now
        self._ready.add(seq)

    def _take_off(self, seq: Sequence) -> None:
        """Free the blocks of a sequence that leaves the batch, and have the worker forget it."""
        self._pool.release(seq.blocks)
        seq.blocks.clear()
        if seq.on_worker:
            seq.on_worker = False
            self._drops.append(seq.id)

    # --- committing --------------------------------------------------------------------------

    def _take_token(self, seq: Sequence, item: Sampled, now: float) -> SequenceUpdate:
        assert item.seq == seq.id, "the worker answered for another sequence"
        if item.error is not None:
            self._finish(seq, now)
            return SequenceUpdate(seq, finish_reason="error", error=item.error)
        prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        if seq.first_token_at is None:
            seq.first_token_at = now
            prompt_logprobs = tuple(seq.prompt_logprobs)
        seq.tokens.append(item.token)
        reason = self._finish_reason(seq, item.token)
        if reason is not None:
            self._finish(seq, now)
            self._policy.finished(seq)
        return SequenceUpdate(
            seq,
            tokens=(item.token,),
            logprobs=() if item.logprob is None else (item.logprob,),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
        )

    def _finish_reason(self, seq: Sequence, token: int) -> FinishReason | None:
        if token in seq.stop_token_ids:  # never before min_tokens: the sampler sees to that
            return "stop"
        max_tokens = seq.request.sampling.max_tokens
        if seq.num_output_tokens >= max_tokens or len(seq.tokens) >= self._max_context:
            return "length"
        return None

    def _finish(self, seq: Sequence, now: float) -> None:
        """End a running sequence; `commit` takes it out of the batch."""
        self._take_off(seq)
        seq.phase = Phase.FINISHED
        seq.finished_at = now
        del self._sequences[seq.id]

    def _keep_prompt_logprobs(self, part: PromptLogprobs) -> None:
        """Append those that are new: a prompt that is computed again says the same again."""
        seq = self._sequences.get(part.seq)
        if seq is None:
            return
        kept = seq.prompt_logprobs
        if not kept:
            kept.append(None)
        assert part.start <= len(kept), "a gap in the prompt's logprobs"
        kept.extend(part.entries[len(kept) - part.start :])

    # --- the invariants ----------------------------------------------------------------------

    def check(self) -> None:
        """Recount everything from scratch; AssertionError where a number does not hold."""
        self._pool.check()
        self._ready.check()
        assert len(self._sequences) == len(self._running) + len(self._ready)
        assert len(self._running) <= self._max_running
        keys = [self._keep_key(seq) for seq in self._running]
        assert keys == sorted(keys), "the batch is out of order"
        owners = Counter(block for seq in self._running for block in seq.blocks)
        assert len(owners) == self._pool.num_used, "a block is used by no sequence"
        assert all(self._pool.num_owners(block) == count for block, count in owners.items())
        running = {seq.id for seq in self._running}
        for seq in self._sequences.values():
            assert (seq.phase is Phase.RUNNING) == (seq.id in running)
            assert 0 <= seq.num_computed_tokens <= seq.num_scheduled_tokens <= seq.num_tokens
            assert len(seq.blocks) == blocks_for(seq.num_scheduled_tokens)
            assert seq.num_scheduled_tokens == 0 or seq.phase is Phase.RUNNING
            assert seq.on_worker == (seq.num_scheduled_tokens > 0)
            if self._in_flight is None:
                assert seq.num_computed_tokens == seq.num_scheduled_tokens
