"""A scheduler that decides by dice, one plan ahead of what it knows, as the real one may be."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from numerics.tiny import VOCAB, prompt_of

from quantd.daemon.types import (
    BLOCK_TOKENS,
    BlockCopy,
    Chunk,
    Grammar,
    NewSequence,
    Rebind,
    SamplingParams,
    StepPlan,
    StepResult,
    TokenTable,
)

NUM_BLOCKS = 150
BAD_PLACE = 0
"""A host place that holds NaN."""
MANY = 5
"""Spills, and fetches, in one plan."""

EOS = 2
TABLE = TokenTable(
    tuple(bytes([97 + i % 26]) if i > 2 else b"" for i in range(VOCAB)), (0, 1, EOS), (EOS,)
)
"""Each token is a letter."""


@dataclass
class Seq:
    seq: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    known: list[int] = field(default_factory=list)
    """Output that the scheduler has been told."""
    in_flight: int = 0
    """Tokens that are sampled but not told."""
    computed: int = 0
    """Positions of planned chunks."""
    blocks: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    """Host places of its first blocks, while it is out."""
    num_given: int = 0
    """Blocks that chunks have brought to the worker."""
    stay: int = 0
    """How often it came in."""
    is_in: bool = False
    is_bad: bool = False
    """Its first block will be fetched from the bad place."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.known) + self.in_flight


class Dice:
    """Makes plans. `told` says what a plan gave; at most one plan's result is outstanding."""

    def __init__(self, seed: int, first_seq: int, num_places: int) -> None:
        self._random = random.Random(seed)
        self._next = first_seq
        self._seqs: dict[int, Seq] = {}
        self._free = list(range(NUM_BLOCKS))
        self._uses: Counter[int] = Counter()
        self._places = list(range(BAD_PLACE + 1, num_places))
        self._step = 0
        self._flights: deque[list[tuple[Seq, int]]] = deque()
        """Of each plan that was not told: who is sampled, and in which stay."""
        self.seen: Counter[str] = Counter()
        """What has happened, for the test of the test."""

    def plan(self) -> StepPlan:
        self._step += 1
        self._copies: list[BlockCopy] = []
        self._rebinds: list[Rebind] = []
        self._add: list[NewSequence] = []
        self._drop: list[int] = []
        dice = self._random
        # All leave, or all that have left come back: more copies than a buffer of them holds.
        flood, self._ebb = dice.random() < 0.1, dice.random() < 0.3
        for seq in list(self._seqs.values()):
            if len(seq.known) >= seq.sampling.max_tokens or dice.random() < 0.03:
                self._end(seq)
            elif seq.is_in and (flood or dice.random() < 0.08):
                self._preempt(seq)
            elif seq.is_in and seq.computed >= BLOCK_TOKENS and dice.random() < 0.1:
                self._rebind(seq)
        if len(self._seqs) < 9 and dice.random() < 0.6:
            self._new()
        if dice.random() < 0.2:
            self._fork()
        chunks = [chunk for seq in list(self._seqs.values()) if (chunk := self._chunk(seq))]
        dice.shuffle(chunks)
        sampled = [self._seqs[chunk.seq] for chunk in chunks if chunk.sample]
        self._flights.append([(seq, seq.stay) for seq in sampled])
        kinds = Counter(copy.kind for copy in self._copies)
        self.seen["many spills"] += kinds["spill"] >= MANY
        self.seen["many fetches"] += kinds["fetch"] >= MANY
        self.seen["decodes only"] += bool(chunks) and all(c.stop - c.start == 1 for c in chunks)
        return StepPlan(
            self._step,
            tuple(chunks),
            tuple(self._add),
            tuple(self._drop),
            tuple(self._copies),
            tuple(self._rebinds),
        )

    def told(self, result: StepResult) -> None:
        flight = self._flights.popleft()
        for item, (seq, stay) in zip(result.sampled, flight, strict=True):
            assert item.seq == seq.seq
            if seq.seq not in self._seqs or not seq.is_in or seq.stay != stay:
                self.seen["for nobody"] += 1
                continue
            seq.in_flight -= 1
            seq.known.append(item.token)
            if item.error is not None or item.complete or item.token == EOS:
                self.seen["error" if item.error else "end"] += 1
                seq.known += [0] * seq.sampling.max_tokens  # ends with the next plan

    def end(self) -> StepPlan:
        """Drops all."""
        return StepPlan(self._step + 1, (), drop=tuple(self._seqs))

    # --- what may happen -------------------------------------------------------------------------

    def _new(self) -> None:
        dice = self._random
        prompt = prompt_of(dice.choice((1, 5, 16, 17, 30, 48, 60, 90)), dice.randrange(1000))
        seq = Seq(self._next, prompt, self._sampling())
        self._next += 1
        self._seqs[seq.seq] = seq
        if len(prompt) > BLOCK_TOKENS + 1 and dice.random() < 0.1:
            seq.is_bad = True
        self._enter(seq)

    def _enter(self, seq: Seq) -> None:
        """Also after a preemption: with what is known of it, under its number."""
        tokens = (*seq.prompt, *seq.known)
        self._add.append(NewSequence(seq.seq, tokens, len(seq.prompt), seq.sampling))
        seq.is_in, seq.blocks, seq.num_given = True, [], 0
        seq.stay += 1
        places, seq.saved = seq.saved, []
        if seq.is_bad and not places:
            places = [BAD_PLACE]
        for place in places:
            block = self._take()
            seq.blocks.append(block)
            self._copies.append(BlockCopy("fetch", place, block))
            self.seen["fetch"] += 1
            if place != BAD_PLACE:
                self._places.append(place)
        seq.computed = len(seq.blocks) * BLOCK_TOKENS

    def _preempt(self, seq: Seq) -> None:
        self.seen["preempted"] += 1
        self.seen["preempted with a token in flight"] += seq.in_flight
        self._drop.append(seq.seq)
        # What is computed of tokens that it will not come back with is of no use.
        whole = min(seq.computed, len(seq.prompt) + len(seq.known) - 1) // BLOCK_TOKENS
        for block in seq.blocks[:whole]:
            if not self._places:
                break
            place = self._places.pop()  # the one that was free last
            self._copies.append(BlockCopy("spill", block, place))
            seq.saved.append(place)
            self.seen["spill"] += 1
        self._give(seq.blocks)
        seq.is_in, seq.in_flight, seq.blocks = False, 0, []

    def _rebind(self, seq: Seq) -> None:
        """Its first block becomes another one with the same bytes."""
        block = self._take()
        self._copies.append(BlockCopy("cow", seq.blocks[0], block))
        self._rebinds.append(Rebind(seq.seq, 0, block))
        self._give(seq.blocks[:1])
        seq.blocks[0] = block
        self.seen["rebind"] += 1

    def _fork(self) -> None:
        """Another answer to a prompt that is computed already."""
        ready = [
            seq
            for seq in self._seqs.values()
            if seq.is_in and not seq.is_bad and seq.computed >= len(seq.prompt) > 1
        ]
        if not ready or len(self._seqs) > 9:
            return
        first = self._random.choice(ready)
        start = len(first.prompt) - 1
        shared = start // BLOCK_TOKENS
        twin = Seq(self._next, first.prompt, self._sampling())
        self._next += 1
        self._seqs[twin.seq] = twin
        self._add.append(NewSequence(twin.seq, twin.prompt, len(twin.prompt), twin.sampling))
        own = self._take()
        self._copies.append(BlockCopy("cow", first.blocks[shared], own))
        twin.blocks = [*first.blocks[:shared], own]
        self._uses.update(first.blocks[:shared])
        twin.is_in, twin.computed = True, start
        self.seen["fork"] += 1

    def _end(self, seq: Seq) -> None:
        if seq.is_in:
            self._drop.append(seq.seq)
            self._give(seq.blocks)
        self._places += seq.saved
        self.seen["ended with a token in flight"] += seq.in_flight
        del self._seqs[seq.seq]

    def _chunk(self, seq: Seq) -> Chunk | None:
        dice = self._random
        if not seq.is_in:
            if not self._ebb and dice.random() > 0.3:
                return None
            self._enter(seq)
        if dice.random() < 0.15:
            return None  # it waits; what was added or fetched stays
        left = seq.num_tokens - seq.computed
        if left <= 0:
            return None
        stop = seq.computed + (left if dice.random() < 0.6 else dice.randint(1, left))
        sample = stop == seq.num_tokens
        while len(seq.blocks) * BLOCK_TOKENS < stop:
            seq.blocks.append(self._take())
        given = tuple(seq.blocks[seq.num_given :])
        chunk = Chunk(seq.seq, seq.computed, stop, given, sample)
        seq.num_given = len(seq.blocks)
        seq.computed = stop
        seq.in_flight += sample
        return chunk

    # --- blocks ----------------------------------------------------------------------------------

    def _take(self) -> int:
        block = self._free.pop(self._random.randrange(len(self._free)))
        self._uses[block] = 1
        return block

    def _give(self, blocks: list[int]) -> None:
        for block in blocks:
            self._uses[block] -= 1
            if not self._uses[block]:
                self._free.append(block)

    def _sampling(self) -> SamplingParams:
        dice = self._random
        fields: dict[str, Any] = {"max_tokens": dice.randint(2, 9), "seed": dice.randrange(1 << 40)}
        choices: tuple[tuple[float, dict[str, Any]], ...] = (
            (0.5, {"temperature": dice.choice((0.0, 0.7, 1.3))}),
            (0.2, {"top_k": 7}),
            (0.2, {"top_p": 0.8}),
            (0.1, {"min_p": 0.05}),
            (0.2, {"repetition_penalty": 1.3}),
            (0.2, {"frequency_penalty": 0.4, "presence_penalty": 0.2}),
            (0.2, {"logit_bias": ((5, 3.0), (9, -2.0))}),
            (0.1, {"allowed_token_ids": tuple(range(3, 20))}),
            (0.1, {"min_tokens": 3, "stop_token_ids": (EOS, 7)}),
            (0.3, {"logprobs": dice.choice((0, 1, 5))}),
            (0.3, {"prompt_logprobs": dice.choice((0, 2))}),
            (0.3, {"grammar": Grammar("regex", dice.choice(("[a-d]{2,5}", "(ab|cd)+e")))}),
        )
        for chance, some in choices:
            if dice.random() < chance:
                fields |= some
        return SamplingParams(**({"temperature": 1.0} | fields))
