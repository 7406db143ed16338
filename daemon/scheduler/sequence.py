"""What the scheduler knows of one request that it has taken in."""

from __future__ import annotations

import sys
from enum import Enum

from quantd.daemon.kv.namespace import Namespace
from quantd.daemon.kv.tree import TOKEN_BYTES, Node, Root, encode
from quantd.daemon.types import BLOCK_TOKENS, Request, TokenLogprob


class Phase(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


def blocks_for(num_tokens: int) -> int:
    """KV blocks that hold `num_tokens` positions."""
    return -(-num_tokens // BLOCK_TOKENS)


class Sequence:
    """A request, its tokens so far and how far they are computed.

    Its numbers cut the positions into half-open ranges:

        [0, num_computed)               `blocks` have them; what was taken over from others may
                                        still be on its way, by a step in flight
        [num_computed, num_scheduled)   its own chunks in flight, and what was taken over meanwhile
        [num_scheduled, num_expected)   still to be planned

    where num_computed <= num_scheduled <= num_expected = num_tokens + num_pending: the last
    `num_pending` tokens are sampled by steps in flight and not known here. `blocks` is just enough
    for num_scheduled; the first of them are those of `node` and the nodes above it. Prompt and
    output differ only by `num_prompt_tokens`: after preemption the ranges start again from what
    the prefix tree has kept, and the output is computed again as if it were prompt.

    Made by the engine, one per request; written by the scheduler only.
    """

    __slots__ = (
        "id",
        "request",
        "tokens",
        "key",
        "num_pending",
        "num_computed_tokens",
        "num_scheduled_tokens",
        "blocks",
        "num_told_blocks",
        "num_chunks",
        "num_trimmed",
        "namespace",
        "root",
        "node",
        "stay",
        "keep_key",
        "num_cached_tokens",
        "num_known_blocks",
        "phase",
        "stop_token_ids",
        "prompt_logprobs",
        "aged",
        "on_worker",
        "waiting_since",
        "seconds_waited",
        "num_preemptions",
        "started_at",
        "first_token_at",
        "finished_at",
    )

    def __init__(self, id: int, request: Request) -> None:
        self.id = id
        """Unique for the life of the worker."""
        self.request = request
        self.tokens = list(request.prompt)
        """Prompt and output."""
        self.key = bytearray(encode(request.prompt))
        """The same as the prefix tree compares it."""
        self.num_pending = 0
        """Tokens that plans in flight sample."""
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.blocks: list[int] = []
        """The block of position p is blocks[p // BLOCK_TOKENS]."""
        self.num_told_blocks = 0
        """Those that the worker has in its table."""
        self.num_chunks = 0
        """Its chunks in flight."""
        self.num_trimmed = 0
        """Those of which only layers without a window still hold something."""
        self.namespace: Namespace | None = None
        """In which blocks are shared; set when the scheduler takes it in."""
        self.root: Root | None = None
        """Set exactly while it is at work."""
        self.node: Node | None = None
        """The deepest node of the tree that its blocks belong to."""
        self.stay = 0
        """Which of its stays in the batch this is; what earlier ones sampled is dropped."""
        self.keep_key: tuple[float, ...] = ()
        """`Policy.keep_key` at the start of its stay."""
        self.num_cached_tokens = 0
        """Prompt tokens that it did not have to compute in its first stay."""
        self.num_known_blocks = 0
        """Blocks of its beginning that were there when it joined the queue."""
        self.phase = Phase.WAITING
        self.stop_token_ids = frozenset(request.sampling.stop_token_ids)
        self.prompt_logprobs: list[TokenLogprob | None] = []
        """Gathered over the prompt's chunks; the first entry is None."""
        self.aged = False
        """Was started because it had waited too long, not by the policy; it stays so."""
        self.on_worker = False
        """The worker has a copy of it."""
        self.waiting_since = request.arrival
        self.seconds_waited = 0.0
        """In the waits before the present one."""
        self.num_preemptions = 0
        self.started_at: float | None = None
        """When it was first taken from the queue. This and all times: seconds of the clock."""
        self.first_token_at: float | None = None
        self.finished_at: float | None = None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.id}, {self.phase.value}, {self.num_prompt_tokens}+"
            f"{self.num_output_tokens} tokens, {self.num_computed_tokens} computed)"
        )

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output_tokens(self) -> int:
        """Counts the stop token too."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def output_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_expected_tokens(self) -> int:
        """With those that plans in flight sample."""
        return len(self.tokens) + self.num_pending

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.key += token.to_bytes(TOKEN_BYTES, sys.byteorder)

    @property
    def queue_seconds(self) -> float | None:
        """From its arrival to its first start; None while it waits for that."""
        return None if self.started_at is None else self.started_at - self.request.arrival
