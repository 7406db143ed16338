"""OpenVINO GenAI behind as much of /v1/completions as `load.py` asks for. Loopback only.

    VENV/bin/python benchmarks/openvino_server.py MODEL_DIR --port 9000

A tool of the benchmark: its packages hold no HTTP server, and the others are measured through HTTP.
Runs in an environment of its own with openvino-genai and aiohttp, so it imports nothing of quantd.
Prompts are token ids and the text that comes back is their numbers, which spares it a tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

import numpy as np
import openvino
import openvino_genai
from aiohttp import web

Tokens = asyncio.Queue[list[int] | None]
_TURNS = 4
"""Of the event loop between two steps: to write tokens out, and to read requests that arrived."""


class Batcher:
    """The pipeline and what runs in it. A step blocks the event loop: it holds Python's lock
    anyway, and in a thread of its own it would let the loop have that between steps by chance."""

    def __init__(self, model: str, threads: int) -> None:
        self._work = asyncio.Event()
        self._running: list[tuple[Any, Tokens]] = []
        self._num_requests = 0
        settings = openvino_genai.SchedulerConfig()
        settings.cache_size = 2  # GB
        settings.max_num_seqs = 32
        settings.max_num_batched_tokens = 2048
        settings.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            model, settings, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )

    def submit(self, prompt: list[int], max_tokens: int) -> Tokens:
        """Lists of new tokens as they come, then None."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.ignore_eos = True
        config.do_sample = False
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        handle = self._pipeline.add_request(self._num_requests, ids, config)
        self._num_requests += 1
        tokens: Tokens = asyncio.Queue()
        self._running.append((handle, tokens))
        self._work.set()
        return tokens

    async def run(self) -> None:
        while await self._work.wait():
            self._pipeline.step()
            self._running = [entry for entry in self._running if self._hand_out(*entry)]
            if not self._running:
                self._work.clear()
            for _ in range(_TURNS):
                await asyncio.sleep(0)

    def _hand_out(self, handle: Any, tokens: Tokens) -> bool:
        """Passes on what `handle` has; False once it is at its end."""
        while handle.can_read():
            for output in handle.read().values():
                tokens.put_nowait(list(output.generated_ids))
        if handle.get_status() == openvino_genai.GenerationStatus.RUNNING:
            return True
        tokens.put_nowait(None)
        return False


async def complete(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    tokens = request.app["batcher"].submit(body["prompt"], body["max_tokens"])
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 0}
    if not body.get("stream"):
        text = ""
        while (new := await tokens.get()) is not None:
            usage["completion_tokens"] += len(new)
            text += "".join(f" {token}" for token in new)
        return web.json_response({"choices": [{"index": 0, "text": text}], "usage": usage})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    while (new := await tokens.get()) is not None:
        for token in new:
            usage["completion_tokens"] += 1
            await _send(response, {"choices": [{"index": 0, "text": f" {token}"}]})
    await _send(response, {"choices": [], "usage": usage})
    await response.write(b"data: [DONE]\n\n")
    return response


async def _send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


async def start(app: web.Application) -> None:
    app["batcher"] = Batcher(app["model"], app["threads"])
    app["task"] = asyncio.create_task(app["batcher"].run())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="a folder that optimum-cli export openvino made")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    app = web.Application()
    app["model"], app["threads"] = options.model, options.threads
    app.on_startup.append(start)
    app.router.add_post("/v1/completions", complete)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None)


if __name__ == "__main__":
    main()
