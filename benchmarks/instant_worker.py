"""A worker that answers every plan at once: what is left is the cost of the daemon alone."""

from __future__ import annotations

import argparse
import socket

from quantd.daemon.frames import FrameSocket
from quantd.daemon.types import LoadModel, ModelInfo, Sampled, StepPlan, StepResult, ToWorker

FIRST_TOKEN, NUM_TOKENS = 300, 4000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    wire: FrameSocket[ToWorker] = FrameSocket(
        socket.socket(fileno=parser.parse_args().fd), ToWorker
    )
    load = wire.receive()
    assert isinstance(load, LoadModel)
    wire.send(
        ModelInfo(
            architecture="none",
            num_parameters=0,
            weight_bytes=0,
            vocab_size=8192,
            max_context=8192,
            dtype="none",
            device="none",
            block_bytes=1,
            num_blocks=1 << 20,
            seconds=0.0,
        )
    )
    while (plan := wire.receive()) is not None:
        assert isinstance(plan, StepPlan)
        sampled = tuple(
            Sampled(chunk.seq, FIRST_TOKEN + (chunk.seq * 31 + chunk.stop * 7) % NUM_TOKENS)
            for chunk in plan.chunks
            if chunk.sample
        )
        wire.send(StepResult(plan.step, sampled))


if __name__ == "__main__":
    main()
