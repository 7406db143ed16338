"""The HTTP face over a scripted engine: a real socket, real text, no model and no worker.

Import as `from server_fakes import serving` (pytest's `pythonpath` has `tests`).
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from fakes import make_tables
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from quantd.daemon.config import (
    ModelSettings,
    SafetySettings,
    ServerSettings,
    Settings,
    StoreSettings,
    WebhookSettings,
)
from quantd.daemon.engine.stats import EngineStats, RequestState
from quantd.daemon.engine.stream import Leaving, TokenStream
from quantd.daemon.errors import ModelNotFound, QuantdError, RequestError
from quantd.daemon.fleet import ModelStatus
from quantd.daemon.server.admin import AdminActions
from quantd.daemon.server.app import create_app, create_runner
from quantd.daemon.server.auth import ApiKeys
from quantd.daemon.server.connection import connections
from quantd.daemon.server.context import Clock
from quantd.daemon.server.sockets import bind_tcp
from quantd.daemon.server.state import State
from quantd.daemon.telemetry.metrics import Metrics
from quantd.daemon.text import TextModel
from quantd.daemon.text.checkpoint import TextFiles
from quantd.daemon.types import FinishReason, Grammar, ModelInfo, Request, TokenLogprob

BOS, EOS, END = 256, 257, 258
VOCAB_SIZE = 260
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_text_model(template: str | None = TEMPLATE) -> TextModel:
    """One token per byte, its id the byte; then <s> (added in front), </s> and <end>."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<end>")])
    files = TextFiles(
        named_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        extra_special_tokens=(),
        added_tokens=(),
        eos_token_ids=(EOS,),
        bos_token_id=BOS,
        add_bos_token=True,
        add_eos_token=False,
        chat_templates={} if template is None else {"default": template},
        max_context=None,
    )
    return TextModel(tokenizer, files, 512)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the bytes, each with the byte as its id."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b if b in printable else 0x100 + others.index(b)): b for b in range(256)}


@dataclass(frozen=True)
class Answer:
    """What the engine will say: one event for each item of `events`."""

    events: Sequence[Sequence[int] | bytes]
    finish: FinishReason = "stop"
    error: str | None = None
    complete: bool = False
    """With "stop": the last token is text."""


def spoken(text: str, finish: FinishReason = "length") -> Answer:
    """One event per byte; with "stop" the model's own end comes last."""
    events: list[Sequence[int]] = [(byte,) for byte in text.encode()]
    return Answer([*events, (EOS,)] if finish == "stop" else events, finish)


def logprob_of(token: int, k: int) -> TokenLogprob:
    """-token/100, with the k lowest tokens on top."""
    return TokenLogprob(token, -token / 100, tuple((i, -i / 100) for i in range(k)))


class FakeEngine:
    """Plays an answer per request, an event per turn of the event loop; with answer None the test
    pushes into `streams` itself."""

    def __init__(self) -> None:
        self.answer: Callable[[Request], Answer | None] = lambda request: spoken("ok", "stop")
        self.refuse: Callable[[Request], QuantdError | None] = lambda request: None
        self.requests: list[Request] = []
        self.streams: list[TokenStream] = []
        self.aborted: list[str] = []
        self.stopped: list[str] = []
        self.submitted = asyncio.Event()
        self.abort_seen = asyncio.Event()
        self.num_cached_tokens = 0
        self.times: tuple[float, float] | None = None
        """When each request was first in a batch, and when its first token came."""
        self._tasks: list[asyncio.Task[None]] = []

    def submit(self, request: Request) -> TokenStream:
        refusal = self.refuse(request)
        if refusal is not None:
            raise refusal
        stream = TokenStream(lambda reason: self._leave(request.id, stream, reason))
        self.requests.append(request)
        self.streams.append(stream)
        answer = self.answer(request)
        if answer is not None:
            self._tasks.append(asyncio.create_task(self._play(request, stream, answer)))
        self.submitted.set()
        return stream

    def _leave(self, request_id: str, stream: TokenStream, reason: Leaving) -> None:
        (self.stopped if reason == "stop" else self.aborted).append(request_id)
        stream.finish(reason)
        self.abort_seen.set()

    async def _play(self, request: Request, stream: TokenStream, answer: Answer) -> None:
        push_prompt(request, stream)
        if self.times is not None:
            stream.started_at, stream.first_token_at = self.times
        for number, event in enumerate(answer.events, start=1):
            if stream.is_finished:
                return
            push(request, stream, event)
            if number == len(answer.events):  # the last tokens and the reason are one event
                stream.finish(answer.finish, answer.error, answer.complete)
            await asyncio.sleep(0)


def push(request: Request, stream: TokenStream, tokens: Sequence[int] | bytes) -> None:
    """Tokens with their logprobs, when asked for."""
    k = request.sampling.logprobs
    stream.push(tuple(tokens), [] if k is None else [logprob_of(t, k) for t in tokens])


def push_prompt(request: Request, stream: TokenStream) -> None:
    k = request.sampling.prompt_logprobs
    if k is not None:
        stream.push((), (), [None, *(logprob_of(token, k) for token in request.prompt[1:])])


class IdleEngine:
    """What the administrator sees of an engine at rest."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.is_wrong = False
        """Its recount finds something."""

    def check(self) -> None:
        assert not self.is_wrong, "a block is used by no sequence"

    def stats(self) -> EngineStats:
        kv = make_tables(8).kv.stats()
        return EngineStats(0, 0, kv, {"memory": 0, "priority": 0}, 0, 0, 0, 0, 0)

    def requests(self) -> list[RequestState]:
        return [
            RequestState("r-1", "", "decode", 0, 5, 0, 7, 3, 9, 1, 0, 2.5, 0.5),
        ]

    def resize(self, kv_bytes: int) -> None:
        self.calls.append(f"resize {kv_bytes}")

    def shrink(self) -> None:
        self.calls.append("shrink")


@dataclass
class FakeLease:
    name: str
    info: ModelInfo
    engine: FakeEngine
    text: TextModel
    fleet: FakeFleet

    async def __aenter__(self) -> FakeLease:
        self.fleet.num_leases += 1
        return self

    async def __aexit__(self, *error: object) -> None:
        self.fleet.num_leases -= 1

    def keep(self, seconds: float) -> None:
        self.fleet.calls.append(f"keep {self.name} {seconds:g}")

    async def prepare(self, grammar: Grammar) -> None:
        self.fleet.prepared.append(grammar)
        if self.fleet.grammar_error is not None:
            raise RequestError(self.fleet.grammar_error)


def fake_info(max_context: int = 512) -> ModelInfo:
    return ModelInfo("Fake", 0, 0, VOCAB_SIZE, max_context, "float32", "cpu", 64, 64, 0.0)


@dataclass
class FakeFleet:
    """One model, "org/tiny", with the alias "tiny"."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    idle: IdleEngine = field(default_factory=IdleEngine)
    text: TextModel = field(default_factory=byte_text_model)
    info: ModelInfo = field(default_factory=fake_info)
    is_ready: bool = True
    num_leases: int = 0
    num_waiting: int = 0
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Leases wait for it, as for a model that loads."""
    calls: list[str] = field(default_factory=list)
    prepared: list[Grammar] = field(default_factory=list)
    grammar_error: str | None = None
    """Why the model cannot follow any."""
    path: str = "/models/tiny"
    keep_alive: float = -1.0
    idle_seconds: float | None = None

    def __post_init__(self) -> None:
        self.open.set()

    def resolve(self, model: str | None) -> str:
        if model in (None, "org/tiny", "tiny"):
            return "org/tiny"
        raise ModelNotFound(f"The model {model!r} does not exist.", param="model")

    def knows(self, name: str) -> bool:
        return name in ("org/tiny", "tiny")

    async def lease(self, model: str | None) -> FakeLease:
        name = self.resolve(model)
        self.num_waiting += 1
        try:
            await self.open.wait()
        finally:
            self.num_waiting -= 1
        return FakeLease(name, self.info, self.engine, self.text, self)

    def models(self) -> list[ModelStatus]:
        stats = self.idle.stats()
        return [
            ModelStatus(
                name="org/tiny",
                path=self.path,
                state="ready",
                reason=None,
                stage="",
                progress=1.0,
                retry_seconds=None,
                info=self.info,
                aliases=("tiny",),
                max_context=self.info.max_context,
                created=1700000000,
                num_leases=self.num_leases,
                pid=1,
                stats=stats,
                task="auto",
                tool_dialect="auto",
                keep_alive=self.keep_alive,
                idle_seconds=self.idle_seconds,
            )
        ]

    def loaded(self) -> list[str]:
        return ["org/tiny"]

    def engine_of(self, name: str) -> IdleEngine:
        self.resolve(name)
        return self.idle

    def forget(self, mark: str) -> None:
        self.calls.append(f"forget {mark}")

    def unmark(self, mark: str) -> None:
        self.calls.append(f"unmark {mark}")

    def ready(self) -> bool:
        return self.is_ready

    async def load(self, name: str) -> None:
        self.calls.append(f"load {self.resolve(name)}")

    async def unload(self, name: str) -> None:
        self.calls.append(f"unload {self.resolve(name)}")


class Served:
    """A running server and a client that is connected to it."""

    def __init__(
        self,
        fleet: FakeFleet,
        session: aiohttp.ClientSession,
        port: int,
        state: State | None = None,
    ) -> None:
        self.fleet = fleet
        self._state = state
        self.engine = fleet.engine
        self.session = session
        self.port = port

    @property
    def state(self) -> State:
        assert self._state is not None
        return self._state

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        async with self.session.get(path, **options) as response:
            return response.status, await response.json()

    async def post(self, path: str, body: object, **options: Any) -> tuple[int, Any]:
        async with self.session.post(path, json=body, **options) as response:
            return response.status, await response.json()

    async def error(self, path: str, body: object) -> dict[str, Any]:
        """The error object of a request that must fail with 400."""
        status, reply = await self.post(path, body)
        assert status == 400, reply
        error: dict[str, Any] = reply["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    async def events(self, path: str, body: object) -> list[str]:
        """The stream's events and comments as they came, without the blank lines between."""
        async with self.session.post(path, json=body) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            text = await response.text()
        assert text.endswith("\n\n")
        return text[:-2].split("\n\n")

    async def chunks(self, path: str, body: object) -> list[dict[str, Any]]:
        """The stream's JSON objects; it must end in [DONE]."""
        events = await self.events(path, body)
        assert events[-1] == "data: [DONE]"
        return [json.loads(e.removeprefix("data: ")) for e in events[:-1] if e.startswith("data:")]


@asynccontextmanager
async def serving(
    *,
    settings: ServerSettings | None = None,
    fleet: FakeFleet | None = None,
    keys: ApiKeys | None = None,
    clock: Clock | None = None,
    send_buffer: int | None = None,
    store: StoreSettings | None = None,
    webhooks: WebhookSettings | None = None,
    safety: SafetySettings | None = None,
) -> AsyncIterator[Served]:
    """The TCP application on a free port. `send_buffer`: bytes the kernel keeps per connection.
    Without `store` nothing is kept."""
    fleet = fleet or FakeFleet()
    kept = Settings(
        server=settings or ServerSettings(),
        store=store or StoreSettings(),
        webhooks=webhooks or WebhookSettings(),
        models={"org/tiny": ModelSettings(name="org/tiny", path=Path("/models/tiny"))},
        safety=safety or SafetySettings(),
    )
    metrics = Metrics()
    state = State(kept, fleet, metrics, clock)  # type: ignore[arg-type]
    state.resume()
    app = create_app(
        settings or ServerSettings(),
        fleet,  # type: ignore[arg-type]
        metrics,
        keys=keys,
        clock=clock,
        state=state,
    )
    runner = create_runner(app)
    await runner.setup()
    sock = bind_tcp("127.0.0.1", 0)[0]
    if send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = await asyncio.get_running_loop().create_server(connections(runner), sock=sock)
    port = sock.getsockname()[1]
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        try:
            yield Served(fleet, session, port, state)
        finally:
            await state.stop()
            await session.close()
            server.close()
            await runner.cleanup()
            await state.close()


@asynccontextmanager
async def serving_unix(path: str, sock: Any, actions: AdminActions) -> AsyncIterator[Served]:
    """The Unix socket's application, on a socket that is bound already."""
    fleet = FakeFleet()
    app = create_app(ServerSettings(), fleet, Metrics(), admin=actions)  # type: ignore[arg-type]
    runner = create_runner(app)
    await runner.setup()
    server = await asyncio.get_running_loop().create_unix_server(connections(runner), sock=sock)
    connector = aiohttp.UnixConnector(path)
    async with aiohttp.ClientSession("http://localhost", connector=connector) as session:
        try:
            yield Served(fleet, session, 0)
        finally:
            await session.close()
            server.close()
            await runner.cleanup()
