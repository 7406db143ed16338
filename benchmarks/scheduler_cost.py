"""What the control plane itself costs per step: python benchmarks/scheduler_cost.py

Times `Scheduler.plan` and `commit` in the steady state, every running sequence decoding and a
queue of waiting ones behind: each with its own place in its last block; with a long prompt computed
beside them; and all in step, so that in two steps of sixteen each of them ends a block or needs
another. Then `KvCache.match` in a tree that is full, and the memory of its nodes. No model runs.
The times are of the CPU, so a busy machine hardly shows in them.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
import tracemalloc

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.kv.cache import KvCache
from quantd.daemon.kv.namespace import Namespace
from quantd.daemon.kv.pool import BlockPool
from quantd.daemon.kv.tree import KEY_BYTES, Node, encode
from quantd.daemon.scheduler.scheduler import Scheduler
from quantd.daemon.scheduler.sequence import Sequence
from quantd.daemon.scheduler.tables import BlockTables
from quantd.daemon.types import BLOCK_TOKENS, Request, Sampled, SamplingParams, StepPlan, StepResult

STEPS = 500
NUM_WAITING = 1000
LONG = 1_000_000
PROMPT = 100
NUM_NODES = 100_000
MATCH_TOKENS = 128 * 1024
MATCHES = 1000


LOADS = ("decode", "decode + long prompt", "decode in step")


def make_scheduler(policy: str, num_running: int, load: str) -> Scheduler:
    """`num_running` endless sequences that have computed their prompts, but for a long one."""
    in_step = load == "decode in step"
    settings = SchedulerSettings(
        policy=policy,  # type: ignore[arg-type]
        max_running=num_running,
        max_waiting=NUM_WAITING,
        token_budget=num_running * PROMPT if in_step else SchedulerSettings().token_budget,
        overlap=False,
    )
    tables = BlockTables(KvCache(BlockPool(10**7)), "cost")
    scheduler = Scheduler(tables, settings, max_context=10**7)
    ids = itertools.count()

    def add(num_prompt_tokens: int) -> Sequence:
        """No prompt begins as another, so that each has blocks of its own."""
        sampling = SamplingParams(max_tokens=LONG, stop_token_ids=(2, 3))
        seq_id = next(ids)
        prompt = (100 + seq_id,) + (1,) * (num_prompt_tokens - 1)
        seq = Sequence(seq_id, Request(str(seq_id), prompt, sampling))
        scheduler.add(seq)
        return seq

    decoding = num_running - (load == "decode + long prompt")
    running = [add(PROMPT - (0 if in_step else i % BLOCK_TOKENS)) for i in range(decoding)]
    while any(seq.num_output_tokens == 0 for seq in running):
        step(scheduler)
    if decoding < num_running:
        add(2 * LONG)
        step(scheduler)
    for _ in range(NUM_WAITING):
        add(PROMPT)
    return scheduler


def step(scheduler: Scheduler) -> tuple[float, float, StepPlan]:
    """CPU seconds of one plan and of its commit."""
    start = time.thread_time()
    plan = scheduler.plan(start)
    planned = time.thread_time()
    assert plan is not None
    sampled = tuple(Sampled(chunk.seq, 7) for chunk in plan.chunks if chunk.sample)
    # As of a model to which tokens cost nothing: the budget is all that bounds a step.
    result = StepResult(plan.step, sampled, seconds=1e-6)
    ran = time.thread_time()
    scheduler.commit(plan, result, ran)
    return planned - start, time.thread_time() - ran, plan


def spread(seconds: list[float]) -> str:
    """Median and 99th percentile, microseconds."""
    microseconds = [s * 1e6 for s in seconds]
    p99 = statistics.quantiles(microseconds, n=100)[98]
    return f"{statistics.median(microseconds):8.0f} {p99:8.0f}"


def measure(policy: str, num_running: int, load: str) -> str:
    scheduler = make_scheduler(policy, num_running, load)
    timings = [step(scheduler) for _ in range(STEPS)]
    assert all(len(plan.chunks) == num_running for _, _, plan in timings)
    columns = [spread([t[0] for t in timings]), spread([t[1] for t in timings])]
    return f"{policy:9} {num_running:7} {load:21} {columns[0]}  {columns[1]}"


def insert(kv: KvCache, namespace: Namespace, key: bytes) -> int:
    """All blocks of `key` become known, and nobody's; how many are new."""
    before = kv.tree.num_nodes
    root, node, blocks = kv.start(namespace, kv.match(namespace, key, len(key) // KEY_BYTES))
    deepest: Node = node
    for start in range(deepest.depth * KEY_BYTES, len(key), KEY_BYTES):
        new = kv.allocate(1)
        assert new is not None
        deepest = kv.insert(deepest, key[start : start + KEY_BYTES], new[0])
        blocks += new
    kv.release(root, deepest, blocks)
    return kv.tree.num_nodes - before


def measure_match() -> None:
    """Prompts of which all is known, or all up to somewhere, among branches of all lengths."""
    rng = random.Random(1)
    kv = KvCache(BlockPool(2 * NUM_NODES))
    namespace = Namespace(revision="cost")
    num_blocks = MATCH_TOKENS // BLOCK_TOKENS
    long = encode(rng.randrange(50_000) for _ in range(MATCH_TOKENS))
    branches: list[bytes] = []

    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    insert(kv, namespace, long)
    while kv.tree.num_nodes < NUM_NODES:
        kept = rng.randrange(num_blocks) * KEY_BYTES
        own = encode(rng.randrange(50_000) for _ in range(100 * BLOCK_TOKENS))
        key = (long[:kept] + own)[: len(long)]
        insert(kv, namespace, key)
        if len(branches) < 20:
            branches.append(key + bytes(len(long) - len(key)))
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kept_here = sum(len(key) + 33 for key in branches)
    per_node = (after - before - kept_here) / kv.tree.num_nodes

    keys = {"all of it": [long], "a branch": branches}
    print(f"\nKvCache.match, {kv.tree.num_nodes} nodes, {MATCH_TOKENS} tokens: median and p99")
    for name, among in keys.items():
        seconds = []
        for i in range(MATCHES):
            key = bytearray(among[i % len(among)])
            start = time.thread_time()
            kv.match(namespace, key, num_blocks)
            seconds.append(time.thread_time() - start)
        print(f"{name:10} {spread(seconds)}")
    print(f"{per_node:.0f} bytes of memory per node, of which {KEY_BYTES} are its tokens")


def main() -> None:
    print(f"{STEPS} steps each, {NUM_WAITING} waiting; CPU microseconds: median and p99")
    print(f"{'policy':9} {'running':>7} {'load':21} {'plan':>17}  {'commit':>17}")
    for policy in ("fcfs", "priority", "sjf"):
        for num_running in (64, 256):
            for load in LOADS:
                print(measure(policy, num_running, load), flush=True)
    measure_match()


if __name__ == "__main__":
    main()
