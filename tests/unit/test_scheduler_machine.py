"""Any sequence of calls that an engine may make, against what each request says when alone.

`StepLoop` and `FakeWorker` check on the way: the pool and the tables recounted, the budget, chunks
without gaps, no block in two tables, everybody who runs gets on.
"""

from __future__ import annotations

from fakes import StepLoop
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.scheduler.sequence import Phase
from quantd.daemon.types import SamplingParams

NUM_BLOCKS = 12
MAX_CONTEXT = 150


class SchedulerMachine(RuleBasedStateMachine):
    loop: StepLoop

    @initialize(
        policy=st.sampled_from(["fcfs", "priority", "sjf"]),
        max_running=st.integers(1, 6),
        token_budget=st.integers(1, 64),
        aging_seconds=st.sampled_from([1.0, 20.0]),
    )
    def start(self, policy: str, max_running: int, token_budget: int, aging_seconds: float) -> None:
        self.loop = StepLoop(
            num_blocks=NUM_BLOCKS,
            max_context=MAX_CONTEXT,
            settings=SchedulerSettings(
                policy=policy,  # type: ignore[arg-type]
                max_running=max_running,
                token_budget=token_budget,
                aging_seconds=aging_seconds,
            ),
        )
        self.aborted: set[int] = set()

    @rule(
        num_prompt_tokens=st.integers(1, 120),
        max_tokens=st.integers(1, 60),
        min_tokens=st.integers(0, 5),
        num_stop_tokens=st.sampled_from([0, 0, 10, 60]),
        priority=st.integers(0, 2),
        caller=st.sampled_from(["a", "b"]),
        is_batch=st.booleans(),
        mark=st.sampled_from(["", "m", "n"]),
    )
    def add(
        self,
        num_prompt_tokens: int,
        max_tokens: int,
        min_tokens: int,
        num_stop_tokens: int,
        priority: int,
        caller: str,
        is_batch: bool,
        mark: str,
    ) -> None:
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            stop_token_ids=tuple(range(num_stop_tokens)),
        )
        self.loop.add(
            num_prompt_tokens,
            sampling=sampling,
            priority=priority,
            caller=caller,
            is_batch=is_batch,
            mark=mark,
        )

    @precondition(lambda self: not self.loop.in_flight)
    @rule()
    def begin(self) -> None:
        self.loop.begin()

    @precondition(lambda self: self.loop.in_flight)
    @rule(seconds=st.floats(0, 3))
    def end(self, seconds: float) -> None:
        self.loop.clock.advance(seconds)
        self.loop.end()

    @precondition(lambda self: not self.loop.in_flight)
    @rule(steps=st.integers(2, 30), seconds=st.floats(0, 1))
    def steps(self, steps: int, seconds: float) -> None:
        for _ in range(steps):
            self.loop.step()
            self.loop.clock.advance(seconds)

    @precondition(lambda self: self.loop.scheduler.has_work)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        alive = [s.id for s in self.loop.sequences.values() if s.phase is not Phase.FINISHED]
        seq_id = data.draw(st.sampled_from(alive))
        assert self.loop.scheduler.abort(seq_id)
        self.aborted.add(seq_id)
        self.loop.scheduler.check()

    @rule(mark=st.sampled_from(["m", "n"]))
    def forget(self, mark: str) -> None:
        """At any moment, a step in flight or not."""
        self.loop.scheduler.kv.forget(mark)
        self.loop.scheduler.check()

    @precondition(lambda self: not self.loop.in_flight and self.loop.worker.rows)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.loop.worker.rows)))
        self.loop.worker.errors[seq_id] = "not finite"

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        if self.loop.in_flight:
            self.loop.end()
        self.loop.run(max_steps=5000)
        assert self.loop.pool.num_used == 0
        assert set(self.loop.reasons()) | self.aborted == set(self.loop.sequences)
        assert not set(self.loop.reasons()) & self.aborted
        self.loop.check_outputs()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
