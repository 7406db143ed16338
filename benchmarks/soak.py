"""Random load on a real daemon for minutes: is every answer right, and is nothing left behind?

python benchmarks/soak.py                                 # ten minutes, every policy in turn
python benchmarks/soak.py --seconds 60 --policies sjf
python benchmarks/soak.py --json results/soak.json

The embedded model in float32. A pool of 40 blocks, 24 places on the host and a disk that is full
after 15 files; prompts that share beginnings, several choices, priorities, salts, timeouts, slow
readers, clients that leave, a budget that changes. Each answer is compared with the same request
alone on a daemon without a cache. Meanwhile the daemon recounts its blocks every few seconds. When
all is done its pool must be as before and its memory must have stopped growing. Exit status 1 if
anything is wrong, with all of it.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import machine
import numpy as np
import questions
from peers import Peer, RunningPeer
from questions import MAX_OUTPUT, MAX_PROMPT, Question, Reply

POLICIES = ("fcfs", "priority", "sjf")
BLOCK_BYTES = 128 << 10
"""Of the embedded model in float32."""
NUM_BLOCKS = 40
BUDGETS = (NUM_BLOCKS, 64, (MAX_PROMPT + MAX_OUTPUT) // 16 + 2)
"""In blocks; the smallest holds the longest request alone."""
CLIENTS = 24
DISK_MEBIBYTES = 2
PATIENCE_SECONDS = 600.0
"""Of a client: long, because a large number waits for all small ones on a machine that is busy."""
RECOUNT_SECONDS = 3.0
IDLE_SECONDS = 120.0
"""Within which everything must be at rest after the last client has left."""
MOST_GROWTH = {"daemon": 6.0, "worker": 12.0}
"""MiB over the second half of a policy's time, by the straight line through it. Not looked at below
a minute, in which pools are still being touched for the first time."""

NEVER_FULL = "the disk was never full"


@dataclass
class Outcome:
    """What one policy's time brought."""

    policy: str
    seconds: float
    disk: str
    counts: Counter[str] = field(default_factory=Counter)
    growth: dict[str, float] = field(default_factory=dict)
    resident: dict[str, float] = field(default_factory=dict)
    kv: dict[str, Any] = field(default_factory=dict)
    preemptions: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class Daemon:
    """The daemon under load, from outside."""

    def __init__(self, running: RunningPeer, socket: Path) -> None:
        self.running = running
        self.url = running.url
        # One connection: the daemon's open files are counted, and these are not to change them.
        self._connector = aiohttp.UnixConnector(str(socket), limit=1)
        self._admin = aiohttp.ClientSession(connector=self._connector)
        self.worker = 0

    async def get(self, path: str) -> tuple[int, Any]:
        async with self._admin.get(f"http://localhost{path}") as response:
            return response.status, await response.json()

    async def set_kv(self, **change: Any) -> Any:
        body = {"model": "model", **change}
        async with self._admin.post("http://localhost/admin/kv", json=body) as response:
            return await response.json()

    async def state(self) -> dict[str, Any]:
        engine: dict[str, Any] = (await self.get("/admin/state"))[1]["engines"]["model"]
        return engine

    async def worker_pid(self) -> int | None:
        pid: int | None = (await self.get("/admin/models"))[1]["models"][0]["pid"]
        return pid

    def resident(self) -> dict[str, float]:
        """MiB."""
        pids = {"daemon": self.running.pid, "worker": self.worker}
        return {name: _resident(pid) for name, pid in pids.items()}

    def open_files(self) -> list[str]:
        folder = Path(f"/proc/{self.running.pid}/fd")
        return sorted(re.sub(r"\d+", "", os.readlink(path)) for path in folder.iterdir())

    async def close(self) -> None:
        await self._admin.close()


def _resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


class Load:
    """Clients that ask, wait, leave and come back, until the time is over."""

    def __init__(self, daemon: Daemon, known: list[Question], seed: int, outcome: Outcome) -> None:
        self._daemon = daemon
        self._known = known
        self._seed = seed
        self._outcome = outcome

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        timeout = aiohttp.ClientTimeout(total=PATIENCE_SECONDS)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            await asyncio.gather(*(self._client(session, i, end) for i in range(CLIENTS)))

    async def _client(self, session: aiohttp.ClientSession, number: int, end: float) -> None:
        rng = random.Random(self._seed * 1000 + number)
        while time.monotonic() < end and len(self._outcome.wrong) < 20:
            if rng.random() < 0.3:
                await asyncio.sleep(rng.expovariate(3))
            try:
                await self._one(session, rng)
            except (aiohttp.ClientError, TimeoutError) as error:
                self._outcome.wrong.append(f"no answer: {type(error).__name__}: {error}")

    async def _one(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        question = rng.choice(self._known)
        if question.choices == 1 and not question.sampling["temperature"] and rng.random() < 0.3:
            question = questions.follow_up(rng, question)
        max_tokens = rng.randint(1, len(question.answers[0]))
        body = question.body(max_tokens) | {"model": "model", "priority": rng.randint(0, 3)}
        body["stream"] = rng.random() < 0.5
        if rng.random() < 0.3:
            body["cache_salt"] = rng.choice(("red", "blue", str(rng.random())))
        if rng.random() < 0.1:
            body["timeout"] = 10 ** rng.uniform(-2, 0.5)
        if rng.random() < 0.15:
            await self._leave(session, rng, body, question, max_tokens)
            return
        reply = await questions.ask(session, self._daemon.url, body)
        self._judge(body, question, max_tokens, reply)

    async def _leave(
        self,
        session: aiohttp.ClientSession,
        rng: random.Random,
        body: dict[str, Any],
        question: Question,
        max_tokens: int,
    ) -> None:
        """A client that hangs up: after some events of a stream, or at any moment."""
        self._outcome.counts["left"] += 1
        if body["stream"] and rng.random() < 0.5:
            reply = await questions.ask(session, self._daemon.url, body, rng.randint(1, max_tokens))
            self._compare(question, max_tokens, reply)
            return
        task = asyncio.create_task(questions.ask(session, self._daemon.url, body))
        await asyncio.wait([task], timeout=10 ** rng.uniform(-3, 0.3))
        task.cancel()
        await asyncio.wait([task])

    def _judge(
        self, body: dict[str, Any], question: Question, max_tokens: int, reply: Reply
    ) -> None:
        counts = self._outcome.counts
        self._compare(question, max_tokens, reply)
        if reply.complete:
            counts["answered"] += 1
            counts["tokens"] += sum(map(len, reply.tokens))
            return
        code = (reply.error or {}).get("code")
        if code == "deadline_exceeded" and "timeout" in body:
            counts["timed out"] += 1
        elif reply.status == 429:
            counts["refused"] += 1
        else:
            self._outcome.wrong.append(f"status {reply.status}, {reply.error}, asked: {body}")

    def _compare(self, question: Question, max_tokens: int, reply: Reply) -> None:
        self._outcome.counts["compared"] += any(reply.tokens)
        wrong = questions.difference(question, max_tokens, reply)
        if wrong is not None:
            self._outcome.wrong.append(wrong)


async def watch(daemon: Daemon, outcome: Outcome, seed: int) -> None:
    """Recounts, changes the budget and notes the memory, until it is cancelled."""
    rng = random.Random(seed)
    samples: list[tuple[float, dict[str, float]]] = []
    start = time.monotonic()
    try:
        while True:
            await asyncio.sleep(RECOUNT_SECONDS)
            samples.append((time.monotonic() - start, daemon.resident()))
            await recount(daemon, outcome)
            if rng.random() < 0.2:
                await daemon.set_kv(kv_bytes=rng.choice(BUDGETS) * BLOCK_BYTES)
            elif rng.random() < 0.1:
                await daemon.set_kv(shrink=True)
    finally:
        half = [sample for sample in samples if sample[0] >= samples[-1][0] / 2]
        for name in MOST_GROWTH if len(half) > 2 else ():
            times, sizes = [at for at, _ in half], [size[name] for _, size in half]
            slope = float(np.polyfit(times, sizes, 1)[0])
            outcome.growth[name] = round(slope * (times[-1] - times[0]), 2)
            outcome.resident[name] = round(sizes[-1], 1)


async def recount(daemon: Daemon, outcome: Outcome) -> None:
    status, answer = await daemon.get("/admin/check")
    outcome.counts["recounts"] += 1
    if status != 200:
        outcome.wrong.append(f"a recount says: {answer}")


async def come_to_rest(daemon: Daemon, outcome: Outcome, files_before: list[str]) -> None:
    """Nobody asks any more: what is still held?"""
    deadline = time.monotonic() + IDLE_SECONDS
    while (state := await daemon.state())["requests"] or state["kv"]["used"]:
        if time.monotonic() > deadline:
            outcome.wrong.append(f"still held {IDLE_SECONDS:g} s after the last client: {state}")
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(2)  # connections close; what is not on disk yet is written
    outcome.kv, outcome.preemptions = state["kv"], state["preemptions"]
    await recount(daemon, outcome)
    kv = await daemon.set_kv(kv_bytes=NUM_BLOCKS * BLOCK_BYTES, shrink=True)
    if (kv["free"], kv["used"], kv["cached"]) != (NUM_BLOCKS, 0, 0):
        outcome.wrong.append(f"the pool is not at its start: {kv}")
    if await daemon.worker_pid() != daemon.worker:
        outcome.wrong.append("the worker has died meanwhile")
    deadline = time.monotonic() + IDLE_SECONDS
    while more := Counter(daemon.open_files()) - Counter(files_before):
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.2)
    if more:
        outcome.wrong.append(f"open files that were not there before the load: {dict(more)}")


def peer(socket: Path, *arguments: str) -> Peer:
    command = [sys.executable, "-m", "quantd.daemon", "serve", "model=embedded:demo"]
    command += ["--host", "127.0.0.1", "--port", "{port}", "--socket", str(socket)]
    command += ["--dtype", "float32", "--threads", "1", *arguments]
    return Peer("quantd", "soak", tuple(command), {"OMP_NUM_THREADS": "1"})


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """Makes `folder` a file system that fills up, where this user may; says what it is."""
    folder.mkdir()
    size = f"size={DISK_MEBIBYTES}M"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    if shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0:
        try:
            yield f"a full file system of {DISK_MEBIBYTES} MiB"
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    else:
        yield "a budget of 1 MiB, no full file system: mounting one needs root"


async def soak(policy: str, known: list[Question], seconds: float, seed: int) -> Outcome:
    """One policy's daemon under load, from its start to its end."""
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name, "disk")) as disk:
        socket = Path(name, "quantd.sock")
        outcome = Outcome(policy, seconds, disk)
        arguments = ["--policy", policy, "--max-running", "8", "--aging-seconds", "2"]
        arguments += ["--token-budget", "256", "--max-waiting", "30"]
        arguments += ["--kv-bytes", str(NUM_BLOCKS * BLOCK_BYTES), "--max-context", "400"]
        arguments += ["--host-kv-bytes", "3MiB", "--disk-kv-path", str(Path(name, "disk", "kv"))]
        arguments += ["--disk-kv-bytes", "16MiB" if "full" in disk else "1MiB"]
        with RunningPeer(peer(socket, *arguments)) as running:
            daemon = Daemon(running, socket)
            try:
                await _soak(daemon, outcome, known, seed)
            finally:
                await daemon.close()
            half_written = list(Path(name, "disk").rglob("*.new"))
            if half_written:
                outcome.wrong.append(f"files that were not finished: {half_written}")
            if "full" in disk and "No space left" not in running.log():
                outcome.wrong.append(NEVER_FULL)
            errors = [line for line in running.log().splitlines() if "Traceback" in line]
            outcome.wrong += [f"in the log: {line}" for line in errors]
    return outcome


async def _soak(daemon: Daemon, outcome: Outcome, known: list[Question], seed: int) -> None:
    daemon.worker = await daemon.worker_pid() or 0
    files = daemon.open_files()
    watching = asyncio.create_task(watch(daemon, outcome, seed))
    await Load(daemon, known, seed, outcome).run(outcome.seconds)
    await come_to_rest(daemon, outcome, files)
    watching.cancel()
    await asyncio.wait([watching])
    if not watching.cancelled() and (error := watching.exception()) is not None:
        outcome.wrong.append(f"watching failed: {type(error).__name__}: {error}")
    for name, growth in outcome.growth.items():
        if outcome.seconds >= 60 and growth > MOST_GROWTH[name]:
            outcome.wrong.append(f"the {name} grew by {growth} MiB in the second half")


def run(seconds: float, policies: list[str], seed: int, num_questions: int) -> list[Outcome]:
    """Every policy for its part of the time."""
    known = questions.make(random.Random(seed), num_questions)
    with tempfile.TemporaryDirectory() as name:
        alone = peer(Path(name, "quantd.sock"), "--prefix-cache", "false", "--overlap", "false")
        with RunningPeer(alone) as running:
            asyncio.run(questions.answer_alone(running.url, known))
    each = seconds / len(policies)
    return [asyncio.run(soak(policy, known, each, seed + i)) for i, policy in enumerate(policies)]


def describe(outcome: Outcome) -> str:
    counts = ", ".join(f"{count} {what}" for what, count in sorted(outcome.counts.items()))
    moved = ", ".join(f"{way} {blocks}" for way, blocks in outcome.kv["moved_blocks"].items())
    growth = ", ".join(f"{name} {size:+} MiB" for name, size in outcome.growth.items())
    return (
        f"{outcome.policy}, {outcome.seconds:g} s, {outcome.disk}: {counts}; preempted "
        f"{outcome.preemptions}; blocks moved: {moved}; second half: {growth or 'too short'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="of load, all policies together")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    outcomes = run(arguments.seconds, arguments.policies, arguments.seed, arguments.questions)
    for outcome in outcomes:
        print(describe(outcome), flush=True)
    wrong = [f"{outcome.policy}: {line}" for outcome in outcomes for line in outcome.wrong]
    if arguments.json:
        record = {
            "command": " ".join(["python", "benchmarks/soak.py", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "machine": machine.describe(),
            "outcomes": [vars(outcome) for outcome in outcomes],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join([f"{len(wrong)} violations", *wrong]) if wrong else "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
