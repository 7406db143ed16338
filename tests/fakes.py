"""Stand-ins shared by the tests: a clock that is set by hand, a worker made of plain Python, and
the engine's step loop around a real scheduler.

Import as `from fakes import ManualClock, FakeExecutor` (pytest's `pythonpath` has `tests`).
"""

from __future__ import annotations

import asyncio
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.errors import Unavailable
from quantd.daemon.kv.pool import BlockPool
from quantd.daemon.scheduler.scheduler import Scheduler, SequenceUpdate
from quantd.daemon.scheduler.sequence import Phase
from quantd.daemon.scheduler.sequence import Sequence as Running
from quantd.daemon.types import (
    BLOCK_TOKENS,
    Chunk,
    FinishReason,
    ModelInfo,
    NewSequence,
    PromptLogprobs,
    Request,
    Sampled,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenLogprob,
)

VOCAB_SIZE = 256

NextToken = Callable[[Sequence[int], SamplingParams], int]
"""(all tokens so far, sampling) -> the next token, a pure function."""


class ManualClock:
    """A monotonic clock that moves only when told. Call it to read it, as `time.monotonic`."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> float:
        """Move forward by `seconds` >= 0; returns the new time."""
        assert seconds >= 0, "a monotonic clock does not go back"
        self._now += seconds
        return self._now


def hashed_token(tokens: Sequence[int], sampling: SamplingParams) -> int:
    """The default model: a hash of the seed and of every token before."""
    return zlib.crc32(array("q", tokens).tobytes(), sampling.seed & 0xFFFFFFFF) % VOCAB_SIZE


def model_info(*, num_blocks: int = 64, max_context: int = 512) -> ModelInfo:
    """What the fake worker says of its model."""
    return ModelInfo(
        architecture="FakeForCausalLM",
        num_parameters=0,
        weight_bytes=0,
        vocab_size=VOCAB_SIZE,
        max_context=max_context,
        dtype="float32",
        device="cpu",
        block_bytes=BLOCK_TOKENS * 4,
        num_blocks=num_blocks,
        seconds=0.0,
    )


def make_request(
    prompt: Sequence[int],
    *,
    id: str = "r",
    max_tokens: int = 16,
    priority: int = 0,
    arrival: float = 0.0,
    caller: str = "",
    sampling: SamplingParams | None = None,
) -> Request:
    """A request with the fields that tests vary; `sampling` replaces `max_tokens`."""
    return Request(
        id=id,
        prompt=tuple(prompt),
        sampling=sampling if sampling is not None else SamplingParams(max_tokens=max_tokens),
        priority=priority,
        arrival=arrival,
        caller=caller,
    )


@dataclass
class _Row:
    """What the worker knows of one sequence."""

    tokens: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    num_computed_tokens: int = 0
    blocks: list[int] = field(default_factory=list)


class FakeWorker:
    """Executes plans as a real worker would, and asserts every rule that a plan has to keep.

    "KV" is one token per (block, offset). The next token is computed from what is read back
    through the block table, so a block that is given to two sequences changes somebody's output.
    """

    def __init__(self, num_blocks: int = 64, next_token: NextToken = hashed_token) -> None:
        self.num_blocks = num_blocks
        self.next_token = next_token
        self.rows: dict[int, _Row] = {}
        self.errors: dict[int, str] = {}
        """seq -> the error its next sampling reports."""
        self.num_computed_tokens = 0
        """Over all steps: recomputation after preemption counts again."""
        self._kv: dict[int, int] = {}
        self._step: int | None = None

    def run(self, plan: StepPlan) -> StepResult:
        """One step; raises AssertionError where the plan breaks the protocol."""
        assert self._step is None or plan.step > self._step, "steps go up"
        self._step = plan.step
        for seq in plan.drop:
            assert self.rows.pop(seq, None) is not None, f"drop of unknown sequence {seq}"
        for new in plan.add:
            self._add(new)
        assert not plan.copies, "nothing copies blocks yet"
        assert len({chunk.seq for chunk in plan.chunks}) == len(plan.chunks), "one chunk each"
        for chunk in plan.chunks:
            self._write(chunk)
        self._check_tables()
        sampled = tuple(self._sample(chunk) for chunk in plan.chunks if chunk.sample)
        logprobs = tuple(
            part for chunk in plan.chunks if (part := self._prompt_logprobs(chunk)) is not None
        )
        return StepResult(step=plan.step, sampled=sampled, prompt_logprobs=logprobs)

    def _add(self, new: NewSequence) -> None:
        assert new.seq not in self.rows, f"sequence {new.seq} is known already"
        assert 0 < new.num_prompt_tokens <= len(new.tokens)
        self.rows[new.seq] = _Row(list(new.tokens), new.num_prompt_tokens, new.sampling)

    def _write(self, chunk: Chunk) -> None:
        row = self.rows[chunk.seq]
        assert chunk.start == row.num_computed_tokens, "chunks follow each other without a gap"
        assert chunk.start < chunk.stop <= len(row.tokens)
        assert chunk.sample == (chunk.stop == len(row.tokens)), "sample exactly at the end"
        row.blocks.extend(chunk.blocks)
        assert len(row.blocks) == -(-chunk.stop // BLOCK_TOKENS), "as many blocks as needed"
        for position in range(chunk.start, chunk.stop):
            self._kv[self._slot(row, position)] = row.tokens[position]
        row.num_computed_tokens = chunk.stop
        self.num_computed_tokens += chunk.stop - chunk.start

    def _slot(self, row: _Row, position: int) -> int:
        return row.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS

    def _check_tables(self) -> None:
        owned = [block for row in self.rows.values() for block in row.blocks]
        assert len(owned) == len(set(owned)), "a block is in two tables"
        assert all(0 <= block < self.num_blocks for block in owned)

    def _sample(self, chunk: Chunk) -> Sampled:
        row = self.rows[chunk.seq]
        if (error := self.errors.pop(chunk.seq, None)) is not None:
            return Sampled(seq=chunk.seq, token=-1, error=error)
        seen = [self._kv[self._slot(row, position)] for position in range(chunk.stop)]
        token = self.next_token(seen, row.sampling)
        if len(row.tokens) - row.num_prompt_tokens < row.sampling.min_tokens:
            while token in row.sampling.stop_token_ids:
                token = (token + 1) % VOCAB_SIZE
        row.tokens.append(token)
        logprob = TokenLogprob(token, -1.0) if row.sampling.logprobs is not None else None
        return Sampled(seq=chunk.seq, token=token, logprob=logprob)

    def _prompt_logprobs(self, chunk: Chunk) -> PromptLogprobs | None:
        """The logits of positions [start, stop) speak of the tokens at [start + 1, stop + 1)."""
        row = self.rows[chunk.seq]
        stop = min(chunk.stop + 1, row.num_prompt_tokens)
        if row.sampling.prompt_logprobs is None or chunk.start + 1 >= stop:
            return None
        entries = tuple(TokenLogprob(token, -1.0) for token in row.tokens[chunk.start + 1 : stop])
        return PromptLogprobs(seq=chunk.seq, start=chunk.start + 1, entries=entries)


class FakeExecutor:
    """An Executor over a `FakeWorker`, in this process. Make it inside a running event loop."""

    pid = 0

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        max_context: int = 512,
        next_token: NextToken = hashed_token,
    ) -> None:
        self.info = model_info(num_blocks=num_blocks, max_context=max_context)
        self.worker = FakeWorker(num_blocks, next_token)
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.plans: list[StepPlan] = []
        """Every plan that was handed in, also one that is still held back."""
        self.closed = False
        self._open = asyncio.Event()
        self._open.set()

    def pause(self) -> None:
        """Hold back every step from now on, until `resume` or `die`."""
        self._open.clear()

    def resume(self) -> None:
        self._open.set()

    def die(self, reason: str) -> None:
        """The worker is gone: the step in flight and all later ones raise Unavailable."""
        if not self.died.done():
            self.died.set_result(reason)
        self._open.set()

    async def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        await asyncio.sleep(0)  # a real worker's answer never comes within the same turn
        await self._open.wait()
        if self.died.done():
            raise Unavailable(self.died.result())
        return self.worker.run(plan)

    async def close(self) -> None:
        self.closed = True
        self.die("closed")


def expected_output(
    request: Request, max_context: int = 1 << 30, next_token: NextToken = hashed_token
) -> tuple[list[int], FinishReason]:
    """What the fake model answers to `request` when nothing else is going on."""
    tokens, sampling = list(request.prompt), request.sampling
    while True:
        num_output = len(tokens) - len(request.prompt)
        token = next_token(tokens, sampling)
        while num_output < sampling.min_tokens and token in sampling.stop_token_ids:
            token = (token + 1) % VOCAB_SIZE
        tokens.append(token)
        if token in sampling.stop_token_ids:
            return tokens[len(request.prompt) :], "stop"
        if num_output + 1 >= sampling.max_tokens or len(tokens) >= max_context:
            return tokens[len(request.prompt) :], "length"


class StepLoop:
    """The engine's step loop in lockstep: plan, run, commit; every rule is checked on the way."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        max_context: int = 1 << 30,
        settings: SchedulerSettings | None = None,
    ) -> None:
        self.settings = settings if settings is not None else SchedulerSettings()
        self.pool = BlockPool(num_blocks)
        self.scheduler = Scheduler(self.pool, self.settings, max_context)
        self.worker = FakeWorker(num_blocks)
        self.clock = ManualClock()
        self.max_context = max_context
        self.sequences: dict[int, Running] = {}
        self.outputs: dict[int, list[int]] = {}
        self.updates: list[SequenceUpdate] = []
        self.plans: list[StepPlan] = []
        self._in_flight: tuple[StepPlan, StepResult] | None = None

    @property
    def in_flight(self) -> bool:
        return self._in_flight is not None

    def add(self, num_prompt_tokens: int, max_tokens: int = 8, **fields: object) -> Running:
        """A request that arrives now; its prompt depends on its id and nothing else."""
        seq_id = len(self.sequences)
        sampling = fields.pop("sampling", None) or SamplingParams(max_tokens=max_tokens)
        assert isinstance(sampling, SamplingParams)
        request = make_request(
            [(seq_id * 31 + i) % VOCAB_SIZE for i in range(num_prompt_tokens)],
            id=f"r{seq_id}",
            sampling=sampling,
            arrival=self.clock(),
            **fields,  # type: ignore[arg-type]
        )
        seq = Running(seq_id, request)
        self.sequences[seq_id] = seq
        self.outputs[seq_id] = []
        self.scheduler.add(seq)
        return seq

    def begin(self) -> StepPlan | None:
        """Plan and execute; `end` brings the result back."""
        assert self._in_flight is None
        plan = self.scheduler.plan(self.clock())
        self.scheduler.check()
        if plan is None:
            assert not self.scheduler.has_work
            return None
        self._check_plan(plan)
        self.plans.append(plan)
        self._in_flight = (plan, self.worker.run(plan))
        return plan

    def end(self) -> list[SequenceUpdate]:
        assert self._in_flight is not None
        plan, result = self._in_flight
        self._in_flight = None
        updates = self.scheduler.commit(plan, result, self.clock())
        self.scheduler.check()
        for update in updates:
            self.outputs[update.seq.id].extend(update.tokens)
        self.updates.extend(updates)
        return updates

    def step(self) -> list[SequenceUpdate]:
        """One whole step; no updates also if there was nothing to do."""
        return [] if self.begin() is None else self.end()

    def run(self, max_steps: int = 10_000) -> None:
        """Until nothing is left to do."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")

    def reasons(self) -> dict[int, FinishReason]:
        return {
            update.seq.id: update.finish_reason
            for update in self.updates
            if update.finish_reason is not None
        }

    def check_outputs(self) -> None:
        """Everything that has not been aborted or failed says what it says when it is alone."""
        reasons = self.reasons()
        for seq_id, reason in reasons.items():
            if reason != "error":
                seq = self.sequences[seq_id]
                expected = expected_output(seq.request, self.max_context)
                assert (self.outputs[seq_id], reason) == expected
                assert self.outputs[seq_id] == seq.output_tokens

    def _check_plan(self, plan: StepPlan) -> None:
        sizes = {chunk.seq: chunk.stop - chunk.start for chunk in plan.chunks}
        assert 0 < sum(sizes.values()) <= self.settings.token_budget
        running = [seq for seq in self.sequences.values() if seq.phase is Phase.RUNNING]
        idle = [seq for seq in running if seq.id not in sizes]
        # Everybody who runs gets on, but for the last when it is out of blocks.
        assert len(idle) <= 1
        for seq in idle:
            assert self.pool.num_free == 0
            assert len(seq.blocks) * BLOCK_TOKENS == seq.num_scheduled_tokens
