"""Questions for the soak: what a model says to each alone, and answers compared with that.

An answer of fewer tokens is the beginning of a longer one, whatever else runs. So each question is
asked alone once, at full length, and then in any length, by any way, as often as one likes.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

TOKENS = range(20, 1000)
"""Ordinary tokens of the embedded model."""
MAX_PROMPT = 330
MAX_OUTPUT = 60
MAX_CHOICES = 3


@dataclass
class Question:
    prompt: list[int]
    sampling: dict[str, Any]
    choices: int
    answers: list[list[int]] = field(default_factory=list)
    """Of each choice, alone, MAX_OUTPUT tokens."""

    def body(self, max_tokens: int) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "max_tokens": max_tokens,
            "n": self.choices,
            "ignore_eos": True,
            "return_token_ids": True,
            **self.sampling,
        }


@dataclass
class Reply:
    """What came back, whole or in part."""

    status: int
    tokens: list[list[int]]
    error: dict[str, Any] | None = None
    complete: bool = False


def make(rng: random.Random, count: int) -> list[Question]:
    """Most of them begin with one of a few trunks, cut somewhere: blocks shared and forked at every
    depth, within a block too."""
    trunks = [rng.choices(TOKENS, k=MAX_PROMPT) for _ in range(6)]
    questions = []
    for _ in range(count):
        shared = rng.choice(trunks)[: rng.choice((0, 16, 160, rng.randint(0, MAX_PROMPT - 20)))]
        tail = rng.choices(TOKENS, k=rng.randint(0 if shared else 1, 20))
        choices = rng.randint(2, MAX_CHOICES) if rng.random() < 0.2 else 1
        if choices == 1 and rng.random() < 0.7:
            sampling: dict[str, Any] = {"temperature": 0}
        else:
            sampling = {"temperature": 0.9, "top_p": 0.95, "seed": rng.randrange(1 << 30)}
        questions.append(Question(shared + tail, sampling, choices))
    return questions


def follow_up(rng: random.Random, question: Question) -> Question:
    """A next turn whose answer is known: the greedy answer goes on from any place in it."""
    (answer,) = question.answers
    cut = rng.randint(1, MAX_OUTPUT - 1)
    return Question(question.prompt + answer[:cut], question.sampling, 1, [answer[cut:]])


async def ask(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], leave_after: int | None = None
) -> Reply:
    """`leave_after`: hang up when a stream has brought so many events."""
    reply = Reply(0, [[] for _ in range(body["n"])])
    async with session.post(f"{url}/v1/completions", json=body) as response:
        reply.status = response.status
        if response.status != 200:
            reply.error = (await response.json())["error"]
        elif body.get("stream"):
            await _read_stream(response, reply, leave_after)
        else:
            for choice in (await response.json())["choices"]:
                reply.tokens[choice["index"]] = choice["token_ids"]
            reply.complete = True
    return reply


async def _read_stream(
    response: aiohttp.ClientResponse, reply: Reply, leave_after: int | None
) -> None:
    num_events = 0
    async for line in response.content:
        if line == b"data: [DONE]\n":
            reply.complete = reply.error is None
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        reply.error = event.get("error") or reply.error
        for choice in event.get("choices", ()):
            reply.tokens[choice["index"]] += choice.get("token_ids", ())
        num_events += 1
        if num_events == leave_after:
            response.close()
            return


def difference(question: Question, max_tokens: int, reply: Reply) -> str | None:
    """What is wrong with the tokens that came: too many, too few, others than alone."""
    for index, (got, alone) in enumerate(zip(reply.tokens, question.answers, strict=True)):
        expected = alone[:max_tokens]
        if got != expected[: len(got)] or (reply.complete and len(got) != len(expected)):
            return (
                f"choice {index} of a prompt of {len(question.prompt)} tokens, "
                f"{question.sampling}, max_tokens {max_tokens}: got {got}, alone it is {expected}"
            )
    return None


async def answer_alone(url: str, questions: Sequence[Question]) -> None:
    """One after the other, from a daemon that should share nothing between them."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        for question in questions:
            reply = await ask(session, url, question.body(MAX_OUTPUT))
            if not reply.complete:
                raise RuntimeError(f"a question alone was not answered: {reply}")
            question.answers = reply.tokens
            await asyncio.sleep(0)
