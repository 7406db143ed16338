"""The library's threads: what a job gives whoever takes part, callers at once, forks, and rest.

`pool_stress.c` is the rest: it needs helpers that do not begin, and ThreadSanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quantd.kernels.cpu import library as library_module
from quantd.kernels.cpu.native import Native, pack_panels

_HERE = Path(__file__).parent
_TASKS = Path("/proc/self/task")

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _work(best: Native) -> Callable[[], list[torch.Tensor]]:
    """Operations that are each cut into several tasks."""
    x, gate_up = torch.randn(70, 512), torch.randn(40, 4096)
    weight, norm = pack_panels(torch.randn(600, 512)), torch.rand(512)
    return lambda: [
        best.linear(x, weight, 600, None),
        best.act_and_mul(gate_up, "silu"),
        best.rms_norm(x, norm, 1e-5),
    ]


def _equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_results_do_not_depend_on_the_number_of_threads(best: Native, threads: int) -> None:
    work = _work(best)
    want = work()
    torch.set_num_threads(threads)
    assert all(_equal(work(), want) for _ in range(200))


def test_callers_at_once_do_not_disturb_each_other(best: Native) -> None:
    works = [_work(best) for _ in range(4)]
    wants = [work() for work in works]
    wrong: list[int] = []

    def call(i: int) -> None:
        torch.set_num_threads(1 + i)  # of this thread
        wrong.extend(i for _ in range(150) if not _equal(works[i](), wants[i]))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


_SCRIPT = """
import os, signal, time
from pathlib import Path
import torch
from quantd.kernels.cpu.linear import native

def helpers():
    found = []
    for task in Path("/proc/self/task").iterdir():
        if (task / "comm").read_text().strip() == "quantd-pool":
            lines = (line.partition(":") for line in (task / "status").read_text().splitlines())
            found.append({name: value.strip() for name, _, value in lines})
    return found

def wait_for_two():  # a thread that is not scheduled yet has no name; else this never ends
    while len(helpers()) != 2:
        time.sleep(0.01)

def run(count=50):
    return [lib.act_and_mul(x, "silu") for _ in range(count)][-1]

lib, x = native(), torch.randn(64, 4096)
torch.set_num_threads(1)
want = run()
assert helpers() == [], "before anybody asked for help"
torch.set_num_threads(3)
"""


def _run(script: str, before: Callable[[], None] | None = None) -> None:
    command = [sys.executable, "-c", _SCRIPT + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, preexec_fn=before)
    assert done.returncode == 0, done.stderr


@linux
def test_helpers_begin_when_wanted_block_signals_and_sleep(best: Native) -> None:
    _run("""
run()
wait_for_two()
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
    assert all(int(h["SigBlk"], 16) >> number - 1 & 1 for h in helpers())
while not all(h["State"].startswith("S") for h in helpers()):  # else this never ends
    time.sleep(0.01)
torch.set_num_threads(2)
run()
assert len(helpers()) == 2, "they are kept"
""")


@linux
def test_a_forked_child_has_helpers_of_its_own(best: Native) -> None:
    _run("""
run()
child = os.fork()
if child == 0:
    alone = helpers()
    same = torch.equal(run(), want)
    wait_for_two()
    os._exit(0 if alone == [] and same else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(run(), want)
""")


@linux
def test_all_threads_on_one_core(best: Native) -> None:
    core = min(os.sched_getaffinity(0))
    _run(
        """
same = sum(torch.equal(run(1), want) for _ in range(2000))
assert same == 2000
""",
        lambda: os.sched_setaffinity(0, {core}),
    )


def _compiled(folder: Path, *flags: str) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no gcc on Linux")
    csrc = Path(library_module.__file__).parent / "csrc"
    files = [_HERE / "pool_stress.c", csrc / "parallel.c"]
    options = [
        "-std=gnu11",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{csrc}",
        '-DSOURCES=""',
    ]
    path = folder / "stress"
    link = ["-Wl,--wrap=pthread_create", "-lpthread", "-o", path]
    done = subprocess.run(
        [compiler, *options, *flags, *files, *link], capture_output=True, text=True
    )
    if done.returncode != 0 and "cannot find" in done.stderr:
        pytest.skip(f"the toolchain lacks {flags}")
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_stress(tmp_path: Path, sanitizer: str) -> None:
    program = _compiled(tmp_path, f"-fsanitize={sanitizer}")
    done = subprocess.run([program, "3000"], capture_output=True, text=True, timeout=540)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "0 failures\n"
