"""The three orders in which sequences get and lose their turn. A policy is this file's whole API.

Keys are compared smallest first and end in (arrival, id), so they are never equal and every run is
deterministic. A key is read once, when a sequence joins the queue or the batch.
"""

from __future__ import annotations

from typing import Protocol

from quantd.daemon.config import SchedulerSettings
from quantd.daemon.scheduler.predict import OutputPredictor
from quantd.daemon.scheduler.sequence import Sequence

Key = tuple[float, ...]

MUCH_LESS = 4
"""How many times less work one must have who displaces, since work is a guess; and the part of what
the other has computed that is taken for lost."""


class Policy(Protocol):
    aged_share: float
    """The part of the batch, in [0, 1], that may be held by sequences which were started out of
    turn because they had waited too long. 0 for an order that is itself by age."""

    def rank(self, seq: Sequence) -> int:
        """Waiting sequences of a smaller rank start first, whoever sent them. Between callers whose
        first ones are of one rank, who has had least goes first."""

    def start_key(self, seq: Sequence) -> Key:
        """Waiting sequences of one caller start in this order, which begins with their rank."""

    def keep_key(self, seq: Sequence) -> Key:
        """Running sequences get blocks in this order and lose them in the reverse one.

        It is fixed while they run: an order that changes with progress would let two of them
        preempt each other for ever.
        """

    def displaces(self, waiting: Sequence, running: Sequence) -> bool:
        """May `waiting` take the place of `running`? Must be a strict order: equals never, and who
        was displaced does not displace in turn. Of equal ranks, the caller has not had more."""

    def finished(self, seq: Sequence) -> None:
        """A sequence has ended by itself; a chance to learn."""


class Fcfs:
    """First come, first served. Request.priority is ignored."""

    aged_share = 0.0

    def rank(self, seq: Sequence) -> int:
        return 0

    def start_key(self, seq: Sequence) -> Key:
        return (seq.request.arrival, seq.id)

    def keep_key(self, seq: Sequence) -> Key:
        return (seq.request.arrival, seq.id)

    def displaces(self, waiting: Sequence, running: Sequence) -> bool:
        return False

    def finished(self, seq: Sequence) -> None:
        pass


class Sjf(Fcfs):
    """Least predicted work first, by what was left when it joined the queue or the batch.

    Whoever waits with much less takes the place of one with more. Only the running one's work gets
    less meanwhile, so the two cannot change places again and again.
    """

    aged_share = 1.0

    def __init__(self, predictor: OutputPredictor) -> None:
        self._predictor = predictor

    def start_key(self, seq: Sequence) -> Key:
        return (self._predictor.work_left(seq), seq.request.arrival, seq.id)

    def keep_key(self, seq: Sequence) -> Key:
        return self.start_key(seq)

    def displaces(self, waiting: Sequence, running: Sequence) -> bool:
        left = self._predictor.work_left
        own = running.num_computed_tokens - running.num_cached_tokens
        return left(waiting) * MUCH_LESS + own / MUCH_LESS < left(running)

    def finished(self, seq: Sequence) -> None:
        self._predictor.observe(seq)


class Priority(Fcfs):
    """Smallest Request.priority first, then by arrival; displaces strictly larger numbers.

    Under a load of large numbers that never ends all of them are overdue at some time. Were all of
    the batch theirs, small numbers would wait like the others; so an eighth is.
    """

    aged_share = 1 / 8

    def rank(self, seq: Sequence) -> int:
        return seq.request.priority

    def start_key(self, seq: Sequence) -> Key:
        return (seq.request.priority, seq.request.arrival, seq.id)

    def keep_key(self, seq: Sequence) -> Key:
        return (seq.request.priority, seq.request.arrival, seq.id)

    def displaces(self, waiting: Sequence, running: Sequence) -> bool:
        return waiting.request.priority < running.request.priority


def make_policy(settings: SchedulerSettings) -> Policy:
    match settings.policy:
        case "fcfs":
            return Fcfs()
        case "sjf":
            return Sjf(OutputPredictor())
        case "priority":
            return Priority()
