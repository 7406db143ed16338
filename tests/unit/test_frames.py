"""The wire: what goes in comes out, however the bytes are cut; garbage is an error, not a hang."""

from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantd.daemon import frames
from quantd.daemon.frames import FrameDecoder, FrameEncoder, FrameError, FrameSocket
from quantd.daemon.types import (
    BlockCopy,
    Chunk,
    CompileGrammar,
    FromWorker,
    Grammar,
    GrammarCompiled,
    LoadModel,
    LoadProgress,
    ModelInfo,
    NewSequence,
    Sampled,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenLogprob,
    TokenTable,
    ToWorker,
    WorkerFailed,
)

PLAN = StepPlan(
    step=7,
    chunks=(Chunk(seq=3, start=0, stop=5, blocks=(9,), sample=True), Chunk(4, 20, 21)),
    add=(
        NewSequence(3, (1, 2, 3, 4, 5), 5, SamplingParams(max_tokens=4, logit_bias=((1, 2.5),))),
        NewSequence(4, (1,), 1, SamplingParams(max_tokens=4, grammar=Grammar("regex", "a"))),
    ),
    drop=(1, 2),
    copies=(BlockCopy("cow", 1, 2),),
)
RESULT = StepResult(
    step=7, sampled=(Sampled(3, 11, TokenLogprob(11, -0.5, ((11, -0.5),))),), seconds=0.01
)
INFO = ModelInfo("LlamaForCausalLM", 10, 20, 300, 64, "float32", "cpu", 4096, 100, 0.5)
FROM_WORKER: list[FromWorker] = [
    LoadProgress("weights", 1, 2),
    INFO,
    WorkerFailed("no such tensor", refused=True),
    RESULT,
    GrammarCompiled(7, "it is none"),
]


def from_worker() -> FrameDecoder[FromWorker]:
    return FrameDecoder(FromWorker)


GRAMMAR = Grammar("json_schema", '{"const":"é"}')
TO_WORKER: list[ToWorker] = [
    LoadModel("demo", "/models/demo", threads=2),
    PLAN,
    TokenTable((b"a", b"\xff", b""), (2,), (2,)),
    CompileGrammar(7, GRAMMAR),
]


@pytest.mark.parametrize("message", TO_WORKER)
def test_messages_to_the_worker_survive(message: ToWorker) -> None:
    decoder: FrameDecoder[ToWorker] = FrameDecoder(ToWorker)
    assert decoder.feed(FrameEncoder().encode(message)) == [message]


@given(st.lists(st.sampled_from(FROM_WORKER), max_size=6), st.data())
def test_frames_survive_any_cut(messages: list[FromWorker], data: st.DataObject) -> None:
    encoder, decoder = FrameEncoder(), from_worker()
    wire = b"".join(encoder.encode(message) for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=12)))
    received: list[FromWorker] = []
    for start, stop in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        received += decoder.feed(wire[start:stop])
    assert received == messages
    assert decoder.num_pending_bytes == 0


def test_the_buffer_of_a_long_frame_does_not_leak_into_a_short_one() -> None:
    encoder, decoder = FrameEncoder(), from_worker()
    long, short = WorkerFailed("x" * 5000), WorkerFailed("y")
    assert decoder.feed(encoder.encode(long) + encoder.encode(short)) == [long, short]


def test_a_garbled_length_is_an_error_at_once() -> None:
    with pytest.raises(FrameError, match=f"over the bound of {frames.MAX_FRAME_BYTES}"):
        from_worker().feed(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("payload", [b"\xc1", b"\x80", b"\x81\xa4type\xa4plan", b""])
def test_a_payload_of_another_kind_is_an_error(payload: bytes) -> None:
    with pytest.raises(FrameError, match="not a frame"):
        from_worker().feed(len(payload).to_bytes(4, "big") + payload)


def test_a_frame_over_the_bound_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 100)
    with pytest.raises(FrameError, match="a WorkerFailed frame of .* bytes is over 100"):
        FrameEncoder().encode(WorkerFailed("x" * 200))


def test_blocking_ends_talk_and_see_the_close() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        engine: FrameSocket[FromWorker] = FrameSocket(ours, FromWorker)
        worker: FrameSocket[ToWorker] = FrameSocket(theirs, ToWorker)
        big = LoadModel("m", "p" * 3_000_000)  # more than a socket buffer holds
        sender = threading.Thread(target=engine.send, args=(big,))
        sender.start()
        assert worker.receive() == big
        sender.join()
        worker.send(RESULT)
        assert engine.receive() == RESULT
        ours.sendall(b"\x00\x00\x00\x09half")
        ours.close()
        assert worker.receive() is None
