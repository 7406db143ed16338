"""What each training step reads: conversations, and drills of single skills between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random

import torch
from data import (
    EARLY,
    END,
    EVEN,
    LATE,
    TOOLS,
    Conversation,
    Mix,
    conversation,
    question,
    render,
    single,
)
from tasks import arithmetic, draw
from tokenizers import Tokenizer
from torch import Tensor

# Per size: until which step, and what is read (see `lesson`).
PHASES = {
    "base": (
        (450, "conversations"),
        (650, "copies"),
        (1000, "conversations"),
        (1300, "sums"),
        (1550, "conversations, sums"),
        (2100, "tasks, sums"),
        (2800, "late conversations, tasks, sums"),
        (3600, "lists, tools"),
        (3700, "everything"),
        (3750, "narrow lists, sums"),
        (3950, "narrow tasks, sums"),
        (4120, "narrow tasks, sums, copies"),
    ),
    "draft": (
        (100, "conversations"),
        (400, "copies"),
        (1000, "sums"),
        (1550, "conversations, sums"),
        (2250, "tasks, sums"),
        (3850, "late conversations, tasks, sums"),
        (4000, "narrow tasks, sums, copies"),
    ),
}
# Questions of a step, by the tasks' names in data.EVALUATED.
NARROW = {
    "addition": 2,
    "subtraction": 4,
    "multiplication": 4,
    "sort numbers": 6,
    "sort words": 13,
    "reverse": 6,
    "convert metric": 2,
    "convert other": 3,
    "extract lines": 3,
    "extract json": 3,
    "facts": 7,
    "decline": 2,
    "tool call, natural": 7,
    "tool call, made up": 2,
    "tool result": 1,
}
CONVERSATIONS, MICRO_BATCHES = 32, 8
DRILL_ROWS, DRILL_LENGTH, DRILL_VOCAB = 48, 44, 1000
Example = tuple[list[int], list[bool]]
Batch = tuple[Tensor, Tensor]


def lesson(tokenizer: Tokenizer, size: str, seed: int, step: int) -> Iterator[Batch]:
    """The micro-batches of a step: token ids, and which of them are learnt; padded on the right."""
    phase = next(name for stop, name in PHASES[size] if step < stop)
    if phase == "copies":
        yield copy_drill(seed, step, DRILL_ROWS)
    elif phase == "sums":
        yield sum_drill(tokenizer, seed, step, DRILL_ROWS)
    elif phase == "tasks, sums":
        yield from task_drill(tokenizer, seed, step, 48)
        yield sum_drill(tokenizer, seed, step, 8)
    elif phase == "narrow lists, sums":
        yield from task_drill(tokenizer, seed, step, 72, ("lists",))
        yield sum_drill(tokenizer, seed, step, 24)
    elif phase.startswith("narrow tasks, sums"):
        yield from conversations(tokenizer, EVEN, seed, step, 1)
        yield from questions(tokenizer, NARROW, seed, step)
        yield sum_drill(tokenizer, seed, step, 12)
        if phase.endswith("copies"):
            yield copy_drill(seed, step, 8)
    elif phase == "everything":
        yield from conversations(tokenizer, EVEN, seed, step, 20)
        yield from task_drill(tokenizer, seed, step, 24)
        yield sum_drill(tokenizer, seed, step, 8)
    elif phase == "lists, tools":
        yield from conversations(tokenizer, LATE, seed, step, 5)
        yield from conversations(tokenizer, TOOLS, seed, step, 9)
        yield from task_drill(tokenizer, seed, step, 48)
        yield sum_drill(tokenizer, seed, step, 8)
    elif phase == "conversations":
        yield from conversations(tokenizer, EARLY, seed, step)
    elif phase == "conversations, sums":
        yield from conversations(tokenizer, EARLY, seed, step)
        yield sum_drill(tokenizer, seed, step, 24)
    else:
        yield from conversations(tokenizer, LATE, seed, step)
        yield from task_drill(tokenizer, seed, step, 12)
        yield sum_drill(tokenizer, seed, step, 8)


def encode(tokenizer: Tokenizer, made: Conversation) -> Example:
    """The ids of a conversation, and which of them the model learns to write."""
    ids: list[int] = []
    learn: list[bool] = []
    for text, learned in render(made):
        piece = tokenizer.encode(text).ids
        ids += piece
        learn += [learned] * len(piece)
    return ids, learn


def conversations(
    tokenizer: Tokenizer, mix: Mix, seed: int, step: int, count: int = CONVERSATIONS
) -> Iterator[Batch]:
    """Whole conversations of mixed tasks."""
    examples = [
        encode(tokenizer, conversation(f"{seed} {step} {mix.tools} {i}", mix)) for i in range(count)
    ]
    yield from _grouped(examples, max(2, count * MICRO_BATCHES // CONVERSATIONS))


def questions(
    tokenizer: Tokenizer, counts: Mapping[str, int], seed: int, step: int
) -> Iterator[Batch]:
    """Single questions, so many of each task."""
    examples = [
        encode(tokenizer, question(f"{seed} {step} {i}", name, held_out=False))
        for name, count in counts.items()
        for i in range(count)
    ]
    yield from _grouped(examples, 5)


def task_drill(
    tokenizer: Tokenizer,
    seed: int,
    step: int,
    items: int,
    tasks: tuple[str, ...] = ("lists", "lists", "lists", "lists", "extraction"),
) -> Iterator[Batch]:
    """Single questions of the tasks that need most practice for the tokens that they cost."""
    examples = [encode(tokenizer, single(f"{seed} {step} {i}", tasks)) for i in range(items)]
    yield from _grouped(examples, max(1, items // 16))


def _grouped(examples: list[Example], count: int) -> Iterator[Batch]:
    """About `count` micro-batches with as many tokens each, similar lengths together."""
    examples = sorted(examples, key=lambda e: len(e[0]))
    total = sum(len(ids) for ids, _ in examples)
    group: list[Example] = []
    for position, example in enumerate(examples):
        group.append(example)
        size = sum(len(ids) for ids, _ in group)
        if size >= total / count or position == len(examples) - 1:
            yield _pad([ids for ids, _ in group], 0), _pad([learn for _, learn in group], False)
            group = []


def copy_drill(seed: int, step: int, rows: int) -> Batch:
    """Random tokens, repeated; what is learnt is every copy after the first.

    Looking up what followed the same token earlier is the core of most tasks here. It appears
    all at once, and after 300 thousand tokens of this, where conversations alone took many times
    that without a sign of it.
    """
    rng = Random(f"{seed} drill {step}")
    ids, learnt = [], []
    for _ in range(rows):
        length = rng.randint(4, 20)
        part = [rng.randrange(DRILL_VOCAB) for _ in range(length)] + [DRILL_VOCAB]
        times = max(2, DRILL_LENGTH // (length + 1))
        ids.append([*part * times])
        learnt.append([False] * (length + 1) + [True] * (length + 1) * (times - 1))
    return _pad(ids, 0), _pad(learnt, False)


def sum_drill(tokenizer: Tokenizer, seed: int, step: int, rows: int) -> Batch:
    """Answers of the arithmetic task without questions; the right sides are learnt.

    The answer repeats the problem, so nothing is lost, and an item costs a third of the tokens.
    """
    d = draw(f"{seed} sums {step}", held_out=False)
    ids: list[list[int]] = []
    learnt: list[list[bool]] = []
    for _ in range(rows):
        ids.append([])
        learnt.append([])
        while len(ids[-1]) < DRILL_LENGTH:
            _, answer = arithmetic(d, d.rng.choice("+--×"), close=d.rng.random() < 0.3)
            left, right = answer.split(" =", 1)
            for text, learn in ((f"{left} =", False), (f"{right}{END}", True), ("\n", False)):
                piece = tokenizer.encode(text).ids
                ids[-1] += piece
                learnt[-1] += [learn] * len(piece)
    return _pad(ids, 0), _pad(learnt, False)


def _pad(rows: list[list[int]] | list[list[bool]], value: int) -> Tensor:
    length = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
