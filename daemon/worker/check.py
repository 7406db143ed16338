"""What torch and the kernels make of this machine: the torch half of `quantd check`.

`python -m quantd.daemon.worker.check`, by the protocol of `child.py`. The request has `device`
(auto, cpu or cuda:N), `threads` (0: all cores) and `quick` (nothing is timed). A torch that cannot
be imported gets a report too, so nothing here imports it before that is tried.
"""

from __future__ import annotations

import logging
from typing import Any

from quantd.daemon.machine import processor
from quantd.daemon.worker import child
from quantd.daemon.worker.machine import physical_cores

Report = dict[str, Any]


def check(request: dict[str, Any], send: child.Send) -> Report:
    """`torch.problem` is None, or nothing else is there."""
    # What the kernels warn of is in the report.
    logging.disable(logging.WARNING)
    send({"stage": "torch"})
    try:
        import torch
    except Exception as error:  # whatever a mixed installation can raise
        return {"torch": {"problem": " ".join(f"{type(error).__name__}: {error}".split())}}
    from quantd.kernels import ops

    report: Report = {
        "torch": {
            "problem": None,
            "version": str(torch.__version__),
            "cuda": torch.version.cuda,
            "hip": getattr(torch.version, "hip", None),
        }
    }
    send({"stage": "the native library"})
    ops.set_num_threads(request["threads"] or physical_cores())
    report["threads"] = ops.num_threads()
    report["library"] = _library()
    report["notes"] = list(ops.notes())
    send({"stage": "kernels on the processor"})
    report["kernels"] = _kernels()
    report["rates"] = None
    if not request["quick"]:
        send({"stage": "memory and arithmetic"})
        report["rates"] = _rates()
    from quantd.daemon.worker.check_gpu import check_gpus

    return report | check_gpus(request["device"], request["quick"], torch.cuda, send)


def _library() -> Report:
    """The library's level, and what each better one lacks here."""
    from quantd.kernels.cpu.library import LEVELS, NEEDS, Library, library_file, open_library

    library, file = open_library(), library_file()
    report: Report = {"file": None if file is None else str(file), "problem": None, "level": None}
    if not isinstance(library, Library):
        return report | {"problem": library, "better": []}
    have = processor.flags()
    better = [
        {"level": level, "lacks": [flag for flag in NEEDS[level] if flag not in have]}
        for level in LEVELS[LEVELS.index(library.best_level) + 1 :]
    ]
    return report | {"level": library.best_level, "better": better}


def _kernels() -> list[Report]:
    from quantd.kernels.cpu.check import check as outcomes

    return [outcome._asdict() for outcome in outcomes()]


def _rates() -> Report:
    """Of the processor, in GB/s and GOP/s."""
    import torch

    from quantd.kernels import ops
    from quantd.kernels.bench.roofline import measure_roofline, read_rates, seconds

    threads = ops.num_threads()
    roofline = measure_roofline()
    alone = roofline.read if threads == 1 else read_rates((1,))[0]
    weight = ops.pack_linear(torch.ones(2048, 2048, dtype=torch.bfloat16))
    x = torch.ones(256, 2048, dtype=torch.bfloat16)
    spent = seconds(lambda: ops.linear(x, weight, None), 0.3)
    return {
        "read_one_gb_s": alone / 1e9,
        "read_gb_s": roofline.read / 1e9,
        "float_gop_s": roofline.floats / 1e9,
        "int8_gop_s": None if roofline.integers is None else roofline.integers / 1e9,
        "bfloat16_gop_s": 2 * x.shape[0] * 2048 * 2048 / spent / 1e9,
    }


if __name__ == "__main__":
    child.main(check)
