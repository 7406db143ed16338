"""The settings' structs. Frozen; beside every field its rule and its meaning in one line.

Others take these structs in their constructors and may trust the rules' ranges. `config.toml` at
the repository's root is the same list with the same lines, and each key is a flag of
`quantd serve` too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from quantd.daemon.config.rules import (
    FilePath,
    Flag,
    Integer,
    ModelPath,
    Octal,
    OneOf,
    Seconds,
    Size,
    SocketPath,
    Text,
    Texts,
    Weights,
)
from quantd.daemon.config.safety import SafetySettings

DAY = 86400.0
NAME = Text(pattern=r"[^\s/](?:\S*[^\s/])?", meaning="a name without spaces or outer slashes")
_HOST = Text(pattern=r"[0-9A-Za-z.:*_\[\]%-]+", meaning="a host name or an IP address")
_ORIGIN = Text(pattern=r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", meaning='"*" or "scheme://host[:port]"')
_FORMAT = Text(
    pattern=r"([^\s=,]+=)?[a-z0-9_-]+(,\s*([^\s=,]+=)?[a-z0-9_-]+)*",
    meaning="a format's name, or glob=name, several with commas between",
)
_DEVICE = Text(pattern=r"auto|cpu|cuda(:\d+)?", meaning='"auto", "cpu", "cuda" or "cuda:N"')

Policy = Literal["fcfs", "priority", "sjf"]
ToolDialect = Literal[
    "auto", "none", "hermes", "llama3", "mistral", "pythonic", "qwen_coder", "harmony"
]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "json", "console"]

WEBHOOK_EVENTS = (
    "batch.completed",
    "batch.failed",
    "batch.expired",
    "batch.cancelled",
    "response.completed",
    "response.incomplete",
    "response.failed",
    "response.cancelled",
)
_URL = Text(pattern=r"https?://[^\s/@]+(/\S*)?|", meaning='"http(s)://host[:port][/path]" or ""')
_EVENT = Text(
    pattern="|".join(map(re.escape, WEBHOOK_EVENTS)), meaning="one of " + ", ".join(WEBHOOK_EVENTS)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The sockets and what the HTTP face allows."""

    host: Annotated[
        str,
        _HOST,
        "TCP address to listen on; with any but loopback, set API keys",
    ] = "127.0.0.1"
    port: Annotated[
        int,
        Integer(low=0, high=65535),
        "TCP port; 0 lets the system choose a free one",
    ] = 8420
    socket: Annotated[
        Path | None,
        SocketPath(optional=True),
        'Unix socket; "auto": /run/quantd.sock for root, else $XDG_RUNTIME_DIR/quantd.sock',
    ] = None
    """None: there is none. The loader resolves "auto"."""
    socket_mode: Annotated[
        int,
        Octal(),
        "permission bits of the Unix socket",
    ] = 0o660
    api_keys_file: Annotated[
        Path | None,
        FilePath(optional=True),
        'file of API keys for TCP, one per line; "auto": the service\'s credential "api-key"',
    ] = None
    """None: TCP needs no key. The loader resolves "auto"."""
    body_limit_bytes: Annotated[
        int,
        Size(low=1024),
        "largest request body",
    ] = 32 << 20
    allowed_hosts: Annotated[
        tuple[str, ...],
        Texts(item=_HOST),
        'Host headers accepted beside those of the listening address; ["*"]: all',
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        Texts(item=_ORIGIN),
        'browser origins that may call, e.g. ["http://localhost:3000"]; ["*"]: all',
    ] = ()
    any_model: Annotated[
        bool,
        Flag(),
        "a request for a model that there is not gets the first one of the configuration",
    ] = False
    keepalive_seconds: Annotated[
        float,
        Seconds(low=1, high=3600),
        "between comments on a stream that has nothing to say",
    ] = 15.0
    drain_seconds: Annotated[
        float,
        Seconds(low=0, high=3600, live=True),
        "how long running requests may take to finish when the daemon stops (live)",
    ] = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """How each model's engine chooses its batch."""

    policy: Annotated[
        Policy,
        OneOf(choices=("fcfs", "priority", "sjf")),
        'who is next: "fcfs", "priority" or "sjf" (shortest job first)',
    ] = "fcfs"
    max_running: Annotated[
        int,
        Integer(low=1, high=4096),
        "requests of one model that run at once",
    ] = 64
    token_budget: Annotated[
        int,
        Integer(low=16, high=1 << 20),
        "most tokens computed in one step, prompt and output together",
    ] = 2048
    aging_seconds: Annotated[
        float,
        Seconds(low=0.001, high=DAY),
        "after waiting so long a request is next, whatever the policy",
    ] = 30.0
    max_waiting: Annotated[
        int,
        Integer(low=1, high=1 << 20),
        "requests of one model that may wait; over it the answer is 429",
    ] = 1024
    overlap: Annotated[
        bool,
        Flag(),
        "plan the next step while one runs",
    ] = True
    caller_weights: Annotated[
        Mapping[str, float],
        Weights(),
        "shares of the API keys' names under load, e.g. { alice = 2 }; all others have 1",
    ] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """One model that can be served; `name` is its table's own key."""

    name: Annotated[
        str,
        NAME,
        "the model's id",
    ]
    path: Annotated[
        Path,
        ModelPath(),
        'the checkpoint: folder or .gguf, relative to this file; "embedded:demo": the one inside',
    ]
    dtype: Annotated[
        str,
        OneOf(choices=("auto", "bfloat16", "float16", "float32")),
        '"auto", "bfloat16", "float16", or "float32": quantized weights are then taken exactly',
    ] = "auto"
    quantization: Annotated[
        str,
        _FORMAT,
        '"auto": as the checkpoint; "int8", "w8a8", "int4"; or by layer: "lm_head=dense,*=int4"',
    ] = "auto"
    max_context: Annotated[
        int | None,
        Integer(low=1, high=1 << 30, auto=True),
        'tokens; "auto": what the checkpoint says',
    ] = None
    kv_bytes: Annotated[
        int | None,
        Size(low=1 << 20, auto=True, live=True),
        'budget for KV blocks; "auto": from the memory that is there (live between sizes)',
    ] = None
    kv_dtype: Annotated[
        Literal["auto", "e4m3"],
        OneOf(choices=("auto", "e4m3")),
        'of KV blocks; "auto": as activations; "e4m3": 8 bits, on a GPU only',
    ] = "auto"
    host_kv_bytes: Annotated[
        int,
        Size(low=0),
        "memory for KV blocks that had to leave the pool and may come back; 0: none",
    ] = 0
    disk_kv_path: Annotated[
        Path | None,
        FilePath(optional=True),
        'folder for KV blocks that survive a restart; needs host_kv_bytes; "": none',
    ] = None
    disk_kv_bytes: Annotated[
        int,
        Size(low=1 << 20),
        "most bytes of files in that folder",
    ] = 8 << 30
    prefix_cache: Annotated[
        bool,
        Flag(),
        "reuse the KV blocks of equal prompt beginnings",
    ] = True
    load_format: Annotated[
        Literal["auto", "dummy"],
        OneOf(choices=("auto", "dummy")),
        '"dummy": random weights, to try a configuration out',
    ] = "auto"
    device: Annotated[
        str,
        _DEVICE,
        'where it runs: "auto", "cpu", "cuda" or "cuda:N"',
    ] = "auto"
    threads: Annotated[
        int | None,
        Integer(low=1, high=4096, auto=True),
        'compute threads on a CPU; "auto": physical cores',
    ] = None
    tool_dialect: Annotated[
        ToolDialect,
        OneOf(choices=get_args(ToolDialect)),
        'how the model writes tool calls; "auto": as its chat template says; "none": not at all',
    ] = "auto"
    task: Annotated[
        Literal["auto", "generate", "embed", "rerank"],
        OneOf(choices=("auto", "generate", "embed", "rerank")),
        '"auto": what the checkpoint is for; "embed": embeddings also of a model that generates',
    ] = "auto"
    pooling: Annotated[
        Literal["auto", "mean", "cls", "last"],
        OneOf(choices=("auto", "mean", "cls", "last")),
        'which hidden states make an embedding; "auto": as the checkpoint says',
    ] = "auto"
    matryoshka: Annotated[
        bool,
        Flag(),
        "let `dimensions` cut embeddings although the checkpoint does not say that it may",
    ] = False
    keep_alive: Annotated[
        float,
        Seconds(low=0, high=365 * DAY, forever=True),
        "seconds without a request until it is unloaded; -1: never",
    ] = -1.0
    preload: Annotated[
        bool,
        Flag(),
        "load when the daemon starts, not at the first request",
    ] = True
    aliases: Annotated[
        tuple[str, ...],
        Texts(item=NAME),
        "other names that clients may use",
    ] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """What is logged, and how."""

    level: Annotated[
        LogLevel,
        OneOf(choices=("debug", "info", "warning", "error"), live=True),
        'least severe to show: "debug", "info", "warning" or "error" (live)',
    ] = "info"
    format: Annotated[
        LogFormat,
        OneOf(choices=("auto", "json", "console")),
        '"json", "console", or "auto": console on a terminal, JSON else',
    ] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSettings:
    """What is kept on disk for clients: files, batches, responses, conversations."""

    path: Annotated[
        Path | None,
        FilePath(optional=True),
        'folder; "auto": the service\'s state directory, /var/lib/quantd, or ~/.local/state/quantd',
    ] = None
    """None: there is no such folder. The loader resolves "auto"."""
    file_bytes: Annotated[
        int,
        Size(low=1),
        "largest file that may be uploaded",
    ] = 512 << 20
    files_bytes: Annotated[
        int,
        Size(low=1),
        "all files together, results of batches too; over it uploads are refused",
    ] = 8 << 30
    responses_bytes: Annotated[
        int,
        Size(low=1 << 20),
        "all responses and conversations; over it those go that were used least recently",
    ] = 1 << 30
    responses_seconds: Annotated[
        float,
        Seconds(low=60, high=3650 * DAY, forever=True),
        "how long a response or conversation is kept after its last use; -1: for ever",
    ] = 30 * DAY
    batch_lines: Annotated[
        int,
        Integer(low=1, high=1024),
        "lines of batches that run at once, of all batches together",
    ] = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookSettings:
    """Who is told when a batch or a background response has ended."""

    url: Annotated[
        str,
        _URL,
        'where events are posted to, signed as Standard Webhooks has it; "": nowhere',
    ] = ""
    secret_file: Annotated[
        Path | None,
        FilePath(optional=True),
        'file with the secret, "whsec_" + base64; "auto": the credential "webhook-secret"',
    ] = None
    events: Annotated[
        tuple[str, ...],
        Texts(item=_EVENT),
        'which; []: all, e.g. ["batch.completed", "response.failed"]',
    ] = ()
    allow_private: Annotated[
        bool,
        Flag(),
        "also to loopback, link-local and private addresses",
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The whole configuration in force."""

    server: ServerSettings = field(default_factory=ServerSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    log: LogSettings = field(default_factory=LogSettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    webhooks: WebhookSettings = field(default_factory=WebhookSettings)
    models: Mapping[str, ModelSettings] = field(default_factory=dict)
    safety: SafetySettings = field(default_factory=SafetySettings)
    origin: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Key ("server.port") → "FILE:LINE", "--port", "$QUANTD_LOG", "credential" or "default"."""
    file: Path | None = field(default=None, compare=False)
    """The configuration file that was read."""
