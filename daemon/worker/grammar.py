"""Masks for the sequences that have a grammar, made while the model runs.

A sequence's matcher advances when its token is sampled, and the mask for the next one is made
beside the next step, so that it is ready when that one's logits are. What a mask allows depends on
the grammar and the output alone, so that a preempted sequence, whose matcher is made again from its
tokens, goes on as it would have.

Three threads are at work. The worker's own calls everything here. `masks` makes matchers and
the masks that the own one leaves to it, in the order of the steps; `compiler` makes grammars ready
for sequences that are still to come, which no step waits for. Building the tokenizer keeps Python's
lock: the one step beside it takes so much longer, 0.3 s for 128k tokens, once.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantd.daemon.grammar import digest, first_line, limits, llguidance_text, on_deep_stack
from quantd.daemon.types import (
    CompileGrammar,
    Grammar,
    GrammarCompiled,
    NewSequence,
    Sampled,
    TokenTable,
)

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

Bits = NDArray[np.int32]
"""[ceil(V / 32)]: bit i % 32 of word i // 32 is set where token i is allowed."""

_MAX_CACHED = 512
_MAX_CACHED_SECONDS = 4.0
"""What the cached grammars took to compile, together. llguidance does not say how much memory one
has; it grows with this time, some 200 MB in a second."""

_MAX_MASK_THREADS = 4
_OWN_AT_ONCE = 8
"""Masks on the worker's thread between two looks at the clock."""

CPU_OWN_SECONDS = 0.002
"""Where the model runs on the same cores, the worker's own thread makes masks before the step for
so long; most steps' are done by then. A thread beside the model takes a core from it for several
milliseconds, whatever little it has to do, and on busy cores it takes as long to begin."""


Fill = Callable[["Sequence[LLMatcher]", Bits], None]


class GrammarError(Exception):
    """It cannot be compiled, or goes on no more; the message says why."""


class MaskTiming(NamedTuple):
    """As in `StepResult`."""

    num_masks: int
    seconds: float
    wait_seconds: float


_NOTHING = MaskTiming(0, 0.0, 0.0)
_ENDED = "the sequence has ended"


class _Masks(NamedTuple):
    bits: NDArray[np.int32]
    """[n, ceil(V / 32)]"""
    errors: Sequence[str]
    """As many; empty: there is none."""
    seconds: float


class Constraint:
    """One sequence's place in its grammar. Its matcher belongs to the masks' thread until the
    mask is there, and to the worker's from then until the next one is begun."""

    __slots__ = ("_stop", "_hidden", "matcher", "masks", "row", "error")

    def __init__(self, stop: Sequence[int], eos: Sequence[int]) -> None:
        """stop: sampling one of these ends the sequence."""
        self._stop = frozenset(stop)
        self._hidden = [token for token in eos if token not in self._stop]
        self.matcher: LLMatcher | None = None
        self.masks: Future[_Masks] | None = None
        self.row = 0
        """Of its mask in `masks`."""
        self.error: str | None = None
        """Why nothing more can be sampled. What a plan in flight still samples after an end is
        dropped by the scheduler."""

    def hide_ends(self, bits: Bits) -> None:
        """An end of the model's that would not end the sequence may not be sampled."""
        words = bits.view(np.uint32)
        for token in self._hidden:
            words[token // 32] &= np.uint32(0xFFFFFFFF ^ (1 << token % 32))

    def advance(self, sampled: Sampled) -> Sampled:
        """Take in what was sampled; gives it back with what it means for the grammar."""
        if self.error is not None:
            return msgspec.structs.replace(sampled, error=self.error, is_excluded=True)
        if sampled.error is not None or sampled.token in self._stop:
            self.error = _ENDED
            return sampled
        assert self.matcher is not None
        self.matcher.consume_token(sampled.token)
        if not self.matcher.is_stopped():  # which it is after an error too
            return sampled
        self.error = _error_of(self.matcher) or _ENDED
        if self.error is not _ENDED:
            return msgspec.structs.replace(sampled, error=self.error, is_excluded=True)
        return msgspec.structs.replace(sampled, complete=True)


class Grammars:
    """The grammars of one loaded model. The worker's own thread only."""

    def __init__(self, vocab_size: int, own_seconds: float = 0.0) -> None:
        """own_seconds: how long masks are made on the worker's thread before a step."""
        self._vocab_size = vocab_size
        self._own_seconds = own_seconds
        self._table: TokenTable | None = None
        self._tokenizer: LLTokenizer | None = None
        self._executor: LLExecutor | None = None
        self._cache = _Cache()
        self._compiler = ThreadPoolExecutor(1, "grammar-compiler")
        self._thread = ThreadPoolExecutor(1, "grammar-masks")
        self._building = threading.Lock()
        self._timing = _NOTHING
        self._unbegun: list[Constraint] = []
        """Of the last `advance`."""
        self._own = 0.0
        """Seconds spent on the worker's thread for the step at hand."""

    def set_table(self, table: TokenTable) -> None:
        """Before any grammar; the tokenizer is made of it with the first one."""
        self._table = table

    def compile(self, message: CompileGrammar, send: Callable[[GrammarCompiled], None]) -> None:
        """Makes it ready; `send` is called from another thread."""

        def run() -> None:
            error: str | None = None
            try:
                self._matcher(message.grammar)
            except GrammarError as refused:
                error = str(refused)
            except BaseException as bug:  # whoever waits must hear of it; Rust's panics are such
                error = f"{type(bug).__name__}: {bug}"
            send(GrammarCompiled(message.id, error))

        self._compiler.submit(run)

    def open(self, new: NewSequence) -> Constraint | None:
        """For a sequence that is new, or comes back with output; begins its mask. None: it has no
        grammar."""
        params = new.sampling
        if params.grammar is None:
            return None
        eos = () if self._table is None else self._table.eos
        own = [token for token in eos if token < self._vocab_size]
        constraint = Constraint(params.stop_token_ids, own)
        output = list(new.tokens[new.num_prompt_tokens :])
        first = partial(self._first_mask, constraint, params.grammar, output)
        constraint.masks = self._thread.submit(first)
        return constraint

    def wait(self, constraints: Sequence[Constraint | None]) -> dict[int, Bits]:
        """The masks of those that can go on: row -> bits."""
        self.begin()
        started = time.perf_counter()
        found: dict[int, Bits] = {}
        seconds: dict[int, float] = {}
        for i, constraint in enumerate(constraints):
            if constraint is None or constraint.error is not None:
                continue
            assert constraint.masks is not None
            try:
                masks = constraint.masks.result()
            except GrammarError as error:
                constraint.error = str(error)
                continue
            seconds[id(masks)] = masks.seconds
            constraint.error = masks.errors[constraint.row] or None
            if constraint.error is None:
                found[i] = masks.bits[constraint.row, : -(-self._vocab_size // 32)]
        if seconds:
            waited = self._own + time.perf_counter() - started
            self._timing = MaskTiming(len(found), sum(seconds.values()), waited)
        self._own = 0.0
        return found

    def advance(
        self, constraints: Sequence[Constraint | None], sampled: Sequence[Sampled]
    ) -> list[Sampled]:
        """Takes in what was sampled with the masks of `wait`. Gives it back with what the grammars
        say: ends and errors."""
        said, going = list(sampled), []
        for i, constraint in enumerate(constraints):
            if constraint is not None:
                said[i] = constraint.advance(sampled[i])
                if constraint.error is None:
                    going.append(constraint)
        self._unbegun = going
        return said

    def begin(self) -> None:
        """Begins the masks after the last `advance`, to be called before the model runs. Not done
        by `advance`, after which the step's result can go out first."""
        left, self._unbegun = self._unbegun, []
        started = time.perf_counter()
        while left and self._own < self._own_seconds:
            some, left = left[:_OWN_AT_ONCE], left[_OWN_AT_ONCE:]
            done: Future[_Masks] = Future()
            done.set_result(self._masks(some, self._fill))
            _give(some, done)
            self._own = time.perf_counter() - started
        if left:
            _give(left, self._thread.submit(self._masks, left, self._fill_side_by_side))

    def take_timing(self) -> MaskTiming:
        """Of the masks that were waited for since the last call."""
        timing, self._timing = self._timing, _NOTHING
        return timing

    def close(self) -> None:
        self._compiler.shutdown(cancel_futures=True)
        self._thread.shutdown(cancel_futures=True)

    # --- on either thread --------------------------------------------------------------------

    def _first_mask(self, constraint: Constraint, grammar: Grammar, output: list[int]) -> _Masks:
        constraint.matcher = matcher = self._matcher(grammar)
        if not matcher.consume_tokens(output):
            raise GrammarError(_error_of(matcher))
        return self._masks([constraint], self._fill)

    def _masks(self, constraints: Sequence[Constraint], fill: Fill) -> _Masks:
        from llguidance.numpy import allocate_token_bitmask

        started = time.perf_counter()
        matchers = [c.matcher for c in constraints if c.matcher is not None]
        assert len(matchers) == len(constraints)
        bits = allocate_token_bitmask(len(matchers), self._width)
        fill(matchers, bits)
        errors = [_error_of(matcher) for matcher in matchers]
        for row, constraint in enumerate(constraints):
            constraint.hide_ends(bits[row])
        return _Masks(bits, errors, time.perf_counter() - started)

    @staticmethod
    def _fill(matchers: Sequence[LLMatcher], bits: Bits) -> None:
        from llguidance.numpy import fill_next_token_bitmask

        for row, matcher in enumerate(matchers):
            fill_next_token_bitmask(matcher, bits, row)

    def _fill_side_by_side(self, matchers: Sequence[LLMatcher], bits: Bits) -> None:
        """On the masks' thread only."""
        from llguidance.numpy import fill_next_token_bitmask_par

        if self._executor is None:
            self._executor = _executor()
        numbered = [(matcher, row) for row, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(self._executor, numbered, bits)

    # --- on both ---------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        """Of llguidance's vocabulary: the model's, and an end that no model has."""
        return self._vocab_size + 1

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        """At the grammar's beginning; the caller's own. Raises GrammarError."""
        key = digest(grammar)
        cached = self._cache.get(key)
        if cached is None:
            started = time.perf_counter()
            cached = on_deep_stack(partial(self._compiled, grammar))
            self._cache.put(key, cached, time.perf_counter() - started)
        return cached.deep_copy()

    def _compiled(self, grammar: Grammar) -> LLMatcher:
        from llguidance import LLMatcher

        tokenizer = self._tokenizer_of_model()
        text = llguidance_text(grammar)
        matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits())
        first = matcher.deep_copy()
        first.compute_bitmask()
        if first.is_error():  # also where no text satisfies it
            raise GrammarError(first_line(first.get_error()))
        return matcher

    def _tokenizer_of_model(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._building:
            if self._tokenizer is None:
                assert self._table is not None, "a grammar came before the tokens"
                words = _Words(self._table, self._vocab_size)
                self._tokenizer = LLTokenizer(words, self._width, words.eos_token_ids)  # type: ignore[arg-type]
            return self._tokenizer


class _Words:
    """The tokens as llguidance takes them. Texts are never tokenized here, as masks need none."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, table: TokenTable, vocab_size: int) -> None:
        pieces = list(table.pieces[:vocab_size])
        pieces += [b""] * (vocab_size - len(pieces))
        no_end = vocab_size  # llguidance wants an end, also where a model has none
        self.tokens = [*pieces, b"<no end>"]
        self.eos_token_ids = [*(t for t in table.eos if t < vocab_size), no_end]
        self.eos_token_id = self.eos_token_ids[0]
        special = {token for token in table.special if token < vocab_size}
        self.special_token_ids = sorted(special | set(self.eos_token_ids))

    def __call__(self, text: bytes | str) -> list[int]:
        """For texts that llguidance would force, which `no_forcing` forbids."""
        raise NotImplementedError("texts are not tokenized here")


class _Cache:
    """Compiled grammars, least recently used first. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._matchers: OrderedDict[bytes, tuple[LLMatcher, float]] = OrderedDict()

    def get(self, key: bytes) -> LLMatcher | None:
        with self._lock:
            found = self._matchers.get(key)
            if found is None:
                return None
            self._matchers.move_to_end(key)
            return found[0]

    def put(self, key: bytes, matcher: LLMatcher, seconds: float) -> None:
        """Keeps at least this one, whatever it took."""
        with self._lock:
            self._matchers.pop(key, None)
            self._matchers[key] = matcher, seconds
            while len(self._matchers) > 1 and self._is_over:
                self._matchers.popitem(last=False)

    @property
    def _is_over(self) -> bool:
        taken = sum(seconds for _, seconds in self._matchers.values())
        return len(self._matchers) > _MAX_CACHED or taken > _MAX_CACHED_SECONDS


def _give(constraints: Sequence[Constraint], masks: Future[_Masks]) -> None:
    for row, constraint in enumerate(constraints):
        constraint.masks, constraint.row = masks, row


def _executor() -> LLExecutor:
    """Few threads: the cores are the model's."""
    from llguidance import LLExecutor

    return LLExecutor(max(1, min(_MAX_MASK_THREADS, len(os.sched_getaffinity(0)) // 2)))


def _error_of(matcher: LLMatcher) -> str:
    """Empty: there is none."""
    if not matcher.is_error():
        return ""
    reason = first_line(matcher.get_error())
    if reason == "NoExtensionBias":
        reason = "nothing may follow what was said, and it is not whole; a $ref to itself does that"
    return f"the grammar cannot go on: {reason}"
