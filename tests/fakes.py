"""Stand-ins shared by the tests: a clock that is set by hand, a worker made of plain Python, and
the engine's step loop around a real scheduler.

Import as `from fakes import ManualClock, FakeExecutor` (pytest's `pythonpath` has `tests`).
"""

from __future__ import annotations

import asyncio
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.errors import Unavailable
from quantd.daemon.kv.cache import KvCache
from quantd.daemon.kv.disk import DiskIndex
from quantd.daemon.kv.pool import BlockPool
from quantd.daemon.kv.window import NO_WINDOW, Window
from quantd.daemon.scheduler.scheduler import Scheduler
from quantd.daemon.scheduler.sequence import Phase
from quantd.daemon.scheduler.sequence import Sequence as Running
from quantd.daemon.scheduler.tables import BlockTables
from quantd.daemon.scheduler.updates import SequenceUpdate
from quantd.daemon.types import (
    BLOCK_TOKENS,
    BlockCopy,
    Chunk,
    DiskDone,
    DiskOp,
    FinishReason,
    Grammar,
    ModelInfo,
    NewSequence,
    PromptLogprobs,
    Request,
    Sampled,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenLogprob,
    TokenTable,
)
from quantd.daemon.types import (
    DiskIndex as DiskListing,
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
    cache_salt: str = "",
    deadline: float | None = None,
    is_batch: bool = False,
    mark: str = "",
) -> Request:
    """A request with the fields that tests vary; `sampling` replaces `max_tokens`."""
    return Request(
        id=id,
        prompt=tuple(prompt),
        sampling=sampling if sampling is not None else SamplingParams(max_tokens=max_tokens),
        priority=priority,
        arrival=arrival,
        caller=caller,
        cache_salt=cache_salt,
        deadline=deadline,
        timeout=None if deadline is None else deadline - arrival,
        is_batch=is_batch,
        mark=mark,
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
    through the block table, so bytes that were lost, mixed up or overwritten change somebody's
    output.
    """

    def __init__(
        self, num_blocks: int = 64, next_token: NextToken = hashed_token, window: int = 0
    ) -> None:
        self.num_blocks = num_blocks
        self.window = window
        """Of the layers that are trimmed; 0: there are none."""
        self.trimmed: set[int] = set()
        """Blocks that have lost what these layers had of them."""
        self.next_token = next_token
        self.rows: dict[int, _Row] = {}
        self.errors: dict[int, str] = {}
        """seq -> the error its next sampling reports."""
        self.completes: dict[int, int] = {}
        """seq -> the number of output tokens with which its grammar is complete."""
        self.num_computed_tokens = 0
        """Over all steps: recomputation after preemption counts again."""
        self._kv: dict[int, int] = {}
        self.host: dict[int, list[int | None]] = {}
        self.files: dict[bytes, list[int | None]] = {}
        """The disk: it survives the worker when another one is given the same dictionary."""
        self.seconds = self.copy_seconds = 0.0
        """What every step says that it took."""
        self.disk_error: str | None = None
        """What every write ends with."""
        self.disk_done: list[DiskDone] = []
        """Answers that are not fetched yet."""
        self._step: int | None = None

    def run(self, plan: StepPlan) -> StepResult:
        """One step; raises AssertionError where the plan breaks the protocol."""
        assert self._step is None or plan.step > self._step, "steps go up"
        self._step = plan.step
        for seq in plan.drop:
            assert self.rows.pop(seq, None) is not None, f"drop of unknown sequence {seq}"
        for new in plan.add:
            self._add(new)
        for rebind in plan.rebinds:
            row = self.rows[rebind.seq]
            old, row.blocks[rebind.index] = row.blocks[rebind.index], rebind.block
            assert self._read(old) == self._read(rebind.block), "a rebind changes the bytes"
            assert rebind.block not in self.trimmed
        for copy in plan.copies:
            self._copy(copy)
        for op in plan.disk:
            self._disk(op)
        assert len({chunk.seq for chunk in plan.chunks}) == len(plan.chunks), "one chunk each"
        for chunk in plan.chunks:
            self._write(chunk)
        sampled = tuple(self._sample(chunk) for chunk in plan.chunks if chunk.sample)
        logprobs = tuple(
            part for chunk in plan.chunks if (part := self._prompt_logprobs(chunk)) is not None
        )
        return StepResult(plan.step, sampled, logprobs, self.seconds, self.copy_seconds)

    def _add(self, new: NewSequence) -> None:
        assert new.seq not in self.rows, f"sequence {new.seq} is known already"
        assert 0 < new.num_prompt_tokens <= len(new.tokens)
        self.rows[new.seq] = _Row(list(new.tokens), new.num_prompt_tokens, new.sampling)

    def _write(self, chunk: Chunk) -> None:
        row = self.rows[chunk.seq]
        assert chunk.start >= row.num_computed_tokens, "nothing is computed twice in a stay"
        assert chunk.start < chunk.stop <= len(row.tokens)
        assert chunk.sample == (chunk.stop == len(row.tokens)), "sample exactly at the end"
        row.blocks.extend(chunk.blocks)
        assert len(row.blocks) == -(-chunk.stop // BLOCK_TOKENS), "as many blocks as needed"
        assert all(0 <= block < self.num_blocks for block in chunk.blocks)
        self._check_unshared(row, chunk)
        self._check_window(row, chunk)
        for position in range(chunk.start, chunk.stop):
            self._kv[self._slot(row, position)] = row.tokens[position]
        row.num_computed_tokens = chunk.stop
        self.num_computed_tokens += chunk.stop - chunk.start

    def _check_unshared(self, row: _Row, chunk: Chunk) -> None:
        """Where it writes nobody else has computed anything."""
        written = set(row.blocks[chunk.start // BLOCK_TOKENS :])
        for other in self.rows.values():
            if other is not row:
                done = other.blocks[: -(-other.num_computed_tokens // BLOCK_TOKENS)]
                assert written.isdisjoint(done), "a write to a shared block"

    def _check_window(self, row: _Row, chunk: Chunk) -> None:
        """What it computes sees whole blocks only."""
        for block in row.blocks[-(-chunk.start // BLOCK_TOKENS) :]:
            self.trimmed.discard(block)  # written from its beginning
        if self.window:
            first = max(0, chunk.start - self.window + 1)
            seen = row.blocks[first // BLOCK_TOKENS :]
            assert self.trimmed.isdisjoint(seen), "a block inside of the window is trimmed"

    def _read(self, block: int) -> list[int | None]:
        start = block * BLOCK_TOKENS
        return [self._kv.get(slot) for slot in range(start, start + BLOCK_TOKENS)]

    def _fill(self, block: int, content: list[int | None]) -> None:
        self.trimmed.discard(block)
        for offset, token in enumerate(content):
            if token is not None:
                self._kv[block * BLOCK_TOKENS + offset] = token

    def _copy(self, copy: BlockCopy) -> None:
        if copy.kind == "trim":
            assert self.window
            self.trimmed.add(copy.src)
            return
        assert copy.kind == "fetch" or copy.src not in self.trimmed, "a copy of a trimmed block"
        if copy.kind == "spill":
            self.host[copy.dst] = self._read(copy.src)
        else:
            content = self.host[copy.src] if copy.kind == "fetch" else self._read(copy.src)
            assert None not in content, "a copy of what was never written"
            self._fill(copy.dst, content)

    def _disk(self, op: DiskOp) -> None:
        if op.kind == "remove":
            self.files.pop(op.key, None)
            return
        error = None
        if op.kind == "write":
            error = self.disk_error
            if error is None:
                self.files[op.key] = list(self.host[op.place])
        elif op.key in self.files:
            self.host[op.place] = list(self.files[op.key])
        else:
            error = "no such file"
        self.disk_done.append(DiskDone(op.kind, op.key, error, 1e-6))

    def _slot(self, row: _Row, position: int) -> int:
        return row.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS

    def _sample(self, chunk: Chunk) -> Sampled:
        row = self.rows[chunk.seq]
        if (error := self.errors.pop(chunk.seq, None)) is not None:
            row.tokens.append(-1)  # the next plan may already be on its way
            return Sampled(seq=chunk.seq, token=-1, error=error)
        seen = [self._kv[self._slot(row, position)] for position in range(chunk.stop)]
        token = self.next_token(seen, row.sampling)
        if len(row.tokens) - row.num_prompt_tokens < row.sampling.min_tokens:
            while token in row.sampling.stop_token_ids:
                token = (token + 1) % VOCAB_SIZE
        row.tokens.append(token)
        logprob = TokenLogprob(token, -1.0) if row.sampling.logprobs is not None else None
        complete = self.completes.get(chunk.seq) == len(row.tokens) - row.num_prompt_tokens
        return Sampled(seq=chunk.seq, token=token, logprob=logprob, complete=complete)

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
        self.released: list[list[tuple[int, int]]] = []
        self.on_disk: Callable[[DiskDone | DiskListing], None] | None = None
        self.tables: list[TokenTable] = []
        self.compiled: list[Grammar] = []
        self._last: asyncio.Future[StepResult] | None = None
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

    def execute(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        self.plans.append(plan)
        self._last = asyncio.ensure_future(self._run(plan, self._last))
        return self._last

    async def _run(self, plan: StepPlan, before: asyncio.Future[StepResult] | None) -> StepResult:
        if before is not None:
            await asyncio.wait([before])  # plans run in order
        await asyncio.sleep(0)  # a real worker's answer never comes within the same turn
        await self._open.wait()
        if self.died.done():
            raise Unavailable(self.died.result())
        result = self.worker.run(plan)
        for done in self.worker.disk_done:
            assert self.on_disk is not None
            asyncio.get_running_loop().call_soon(self.on_disk, done)
        self.worker.disk_done.clear()
        return result

    def release_memory(self, blocks: Sequence[tuple[int, int]]) -> None:
        self.released.append(list(blocks))

    def set_tokens(self, table: TokenTable) -> None:
        self.tables.append(table)

    def compile(self, grammar: Grammar) -> asyncio.Future[str | None]:
        """Whatever is no "good" one is refused."""
        assert self.tables, "a grammar came before the tokens"
        self.compiled.append(grammar)
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        future.set_result(None if grammar.source == "good" else "it is none")
        return future

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


def make_tables(
    num_blocks: int = 64,
    *,
    num_places: int = 0,
    disk_files: int = 0,
    share: bool = True,
    capacity: int | None = None,
    window: Window = NO_WINDOW,
    whole: bool = False,
) -> BlockTables:
    """A KV cache with so many blocks, host places and files, none of them used."""
    disk = DiskIndex(disk_files) if disk_files else None
    if disk is not None:
        disk.open((), 1)
    host = BlockPool(num_places) if num_places else None
    pool = BlockPool(num_blocks, capacity, window.share)
    cache = KvCache(pool, host, disk, BLOCK_TOKENS * 4, window)
    return BlockTables(cache, "fake", share, whole)


class StepLoop:
    """The engine's step loop in lockstep: plan, run, commit; every rule is checked on the way.

    With `overlap` a plan is made and run before the one before it is committed.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        max_context: int = 1 << 30,
        settings: SchedulerSettings | None = None,
        overlap: bool = False,
        tables: BlockTables | None = None,
        whole: bool = False,
    ) -> None:
        settings = settings if settings is not None else SchedulerSettings()
        self.settings = replace(settings, overlap=overlap)
        self.tables = tables if tables is not None else make_tables(num_blocks, whole=whole)
        self.kv = self.tables.kv
        self.pool = self.kv.pool
        self.scheduler = Scheduler(self.tables, self.settings, max_context, whole)
        self.whole = whole
        self.worker = FakeWorker(self.pool.capacity, window=self.kv.window.tokens)
        self.clock = ManualClock()
        self.max_context = max_context
        self.sequences: dict[int, Running] = {}
        self.outputs: dict[int, list[int]] = {}
        self.updates: list[SequenceUpdate] = []
        self.plans: list[StepPlan] = []
        self._in_flight: deque[tuple[StepPlan, StepResult]] = deque()

    @property
    def in_flight(self) -> bool:
        return bool(self._in_flight)

    def add(
        self,
        num_prompt_tokens: int,
        max_tokens: int = 8,
        *,
        prompt: Sequence[int] | None = None,
        **fields: object,
    ) -> Running:
        """A request that arrives now; its prompt depends on its id and nothing else, unless it is
        given."""
        seq_id = len(self.sequences)
        sampling = fields.pop("sampling", None) or SamplingParams(max_tokens=max_tokens)
        assert isinstance(sampling, SamplingParams)
        if prompt is None:
            prompt = [(seq_id * 31 + i) % VOCAB_SIZE for i in range(num_prompt_tokens)]
        request = make_request(
            prompt,
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
        assert self.scheduler.may_plan
        plan = self.scheduler.plan(self.clock())
        self.scheduler.check()
        self.take_ended()
        if plan is None:
            assert self._in_flight or not self.scheduler.has_work or self.scheduler.wake_at()
            return None
        self._check_plan(plan)
        self.plans.append(plan)
        self._in_flight.append((plan, self.worker.run(plan)))
        return plan

    def end(self) -> list[SequenceUpdate]:
        """Commit the oldest plan in flight, and what the disk has done."""
        plan, result = self._in_flight.popleft()
        updates = self.scheduler.commit(plan, result, self.clock())
        self.scheduler.check()
        for done in self.worker.disk_done:
            self.scheduler.disk_done(done)
            self.scheduler.check()
        self.worker.disk_done.clear()
        self._take(updates)
        return updates

    def take_ended(self) -> None:
        """What has ended without a step."""
        self._take(self.scheduler.take_ended())

    def _take(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            self.outputs[update.seq.id].extend(update.tokens)
        self.updates.extend(updates)

    def step(self) -> list[SequenceUpdate]:
        """One whole step; no updates also if there was nothing to do."""
        planned = self.begin() if self.scheduler.may_plan else None
        if not self._in_flight or (planned is not None and self.scheduler.may_plan):
            return []
        return self.end()

    def run(self, max_steps: int = 10_000) -> None:
        """Until nothing is left to do."""
        for _ in range(max_steps):
            if not self.scheduler.has_work and not self._in_flight:
                return
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")

    def save(self) -> None:
        """What an engine at rest does: everything that is cached goes to disk."""
        while self.kv.save():
            assert self.begin() is not None
            self.end()

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
            if reason not in ("error", "timeout"):
                seq = self.sequences[seq_id]
                expected = expected_output(seq.request, self.max_context)
                assert (self.outputs[seq_id], reason) == expected
                assert self.outputs[seq_id] == seq.output_tokens

    def _check_whole(self, plan: StepPlan) -> None:
        """Whole prompts, from their beginning, as many as there is a budget for."""
        assert all(chunk.start == 0 and chunk.sample for chunk in plan.chunks)
        num_tokens = sum(chunk.stop for chunk in plan.chunks)
        assert num_tokens <= self.settings.token_budget or len(plan.chunks) == 1

    @staticmethod
    def _follows(seq: Running, other: Running) -> bool:
        """Its next block can be the other's."""
        stop = (seq.num_scheduled_tokens // BLOCK_TOKENS + 1) * BLOCK_TOKENS
        return (
            other is not seq
            and other.request.cache_salt == seq.request.cache_salt
            and other.tokens[:stop] == seq.tokens[:stop]
        )

    def _check_plan(self, plan: StepPlan) -> None:
        sizes = {chunk.seq: chunk.stop - chunk.start for chunk in plan.chunks}
        if self.whole:
            self._check_whole(plan)
            return
        assert sum(sizes.values()) <= self.settings.token_budget
        running = [seq for seq in self.sequences.values() if seq.phase is Phase.RUNNING]
        idle = [
            seq
            for seq in running
            if seq.id not in sizes
            and seq.num_scheduled_tokens < seq.num_expected_tokens
            and not any(self._follows(seq, other) for other in running if other.id in sizes)
        ]
        if self.settings.overlap:
            return
        others = [seq_id for seq_id in sizes if not self.sequences[seq_id].request.is_batch]
        if others:
            idle = [seq for seq in idle if not seq.request.is_batch]
        # Everybody who runs gets on, but for the last when it is out of blocks, lines of
        # batches beside others, and who waits for what another computes.
        assert len(idle) <= 1
        for seq in idle:
            assert self.kv.num_available <= 0
            assert len(seq.blocks) * BLOCK_TOKENS == seq.num_scheduled_tokens
