"""The official SDK, unchanged, against the daemon, over TCP and over the Unix socket.

`test_former_openai_sdk.py` runs this file once more, with the SDK's former generation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal, NamedTuple

import openai
import pytest
from harness import Server
from openai.types.chat import ChatCompletionMessageParam

from quantd.daemon.errors import QuantdError

if int(openai.__version__.split(".")[0]) >= 3:
    import httpx2 as httpx
else:
    import httpx

pytestmark = pytest.mark.xdist_group("clients")
Way = Literal["tcp", "unix"]
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "user", "content": "Sort these numbers: 42, 7, 19"}
]
CHAT: dict[str, Any] = {
    "model": "demo",
    "messages": MESSAGES,
    "temperature": 0,
    "max_completion_tokens": 24,
}
LONG: dict[str, Any] = CHAT | {"max_completion_tokens": 8000, "extra_body": {"ignore_eos": True}}
