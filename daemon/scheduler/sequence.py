"""What the scheduler knows of one request that it has taken in."""

from __future__ import annotations

from enum import Enum

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

    Its numbers cut the tokens into half-open ranges:

        [0, num_computed)               their keys and values are in `blocks`
        [num_computed, num_scheduled)   the step in flight computes them
        [num_scheduled, num_tokens)     still to be planned

    where num_computed <= num_scheduled <= num_tokens, and `blocks` is just enough for
    num_scheduled. Prompt and output differ only by `num_prompt_tokens`: after preemption all three
    ranges start again from nothing, and the output is computed again as if it were prompt.

    Made by the engine, one per request; written by the scheduler only.
    """

    __slots__ = (
        "id",
        "request",
        "tokens",
        "num_computed_tokens",
        "num_scheduled_tokens",
        "blocks",
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
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.blocks: list[int] = []
        """The block of position p is blocks[p // BLOCK_TOKENS]."""
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
    def num_unscheduled_tokens(self) -> int:
        """Known tokens that no plan computes yet: 1 between two decodes."""
        return len(self.tokens) - self.num_scheduled_tokens

    @property
    def num_missing_blocks(self) -> int:
        """Blocks it needs for its known tokens beside those it has."""
        return blocks_for(len(self.tokens)) - len(self.blocks)

    @property
    def queue_seconds(self) -> float | None:
        """From its arrival to its first start; None while it waits for that."""
        return None if self.started_at is None else self.started_at - self.request.arrival
