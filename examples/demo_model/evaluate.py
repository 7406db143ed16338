"""Held-out accuracy per task of an exported checkpoint, or its answer to one question.

    python examples/demo_model/evaluate.py                    # a table for both sizes
    python examples/demo_model/evaluate.py --ask "2 + 2"

An item counts when greedy decoding gives the expected answer exactly, to the last character. That
is so if and only if the most likely token is the expected one at every place of the answer, so one
forward pass over question and answer decides it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import model as llama
import torch
from data import END, EVALUATED, START, Conversation, answer_text, question, render
from tokenizers import Tokenizer
from torch import Tensor

EMBEDDED = Path(__file__).resolve().parents[2] / "daemon" / "embedded"
BATCH = 25


def tokenizer_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encode(tokenizer: Tokenizer, asked: Conversation) -> tuple[list[int], int]:
    """The ids up to the end of the last answer, and how many of them are that answer."""
    pieces = [tokenizer.encode(text).ids for text, _ in render(asked)][:-1]
    return [i for piece in pieces for i in piece], len(pieces[-1])


@torch.no_grad()
def correct(model: llama.Llama, examples: Sequence[tuple[list[int], int]]) -> list[bool]:
    """For each (ids, length of the answer): does greedy decoding give that answer?"""
    longest = max(len(ids) for ids, _ in examples)
    batch = torch.zeros(len(examples), longest, dtype=torch.int64)
    where = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, (ids, answer) in enumerate(examples):
        batch[row, : len(ids)] = torch.tensor(ids)
        where[row, len(ids) - answer - 1 : len(ids) - 1] = True
    likeliest = model(batch, where).argmax(dim=-1)
    wanted = batch[where.roll(1, dims=1)]
    hits: list[Tensor] = list((likeliest == wanted).split([answer for _, answer in examples]))
    return [bool(hit.all()) for hit in hits]


def accuracy(model: llama.Llama, tokenizer: Tokenizer, name: str, count: int) -> float:
    """The share of `count` held-out items of a task that are answered exactly."""
    examples = [encode(tokenizer, question(i, name)) for i in range(count)]
    hits: list[bool] = []
    for start in range(0, count, BATCH):
        hits += correct(model, examples[start : start + BATCH])
    return sum(hits) / count


@torch.no_grad()
def ask(model: llama.Llama, tokenizer: Tokenizer, text: str, limit: int = 200) -> str:
    """The greedy answer to one question, as far as `limit` tokens."""
    prompt = f"{START}user\n{text}{END}\n{START}assistant\n"
    ids = tokenizer.encode(prompt).ids
    made: list[int] = []
    while len(made) < limit:
        batch = torch.tensor([ids + made])
        where = torch.zeros_like(batch, dtype=torch.bool)
        where[0, -1] = True
        made.append(int(model(batch, where).argmax()))
        if made[-1] == tokenizer.token_to_id(END):
            break
    return str(tokenizer.decode(made))


def failures(model: llama.Llama, tokenizer: Tokenizer, name: str, count: int) -> None:
    """Print the questions of a task that go wrong, with the right and the given answer."""
    for i in range(count):
        asked = question(i, name)
        if not correct(model, [encode(tokenizer, asked)])[0]:
            print(repr(asked.messages[0]["content"]), "wanted", answer_text(asked.messages[-1]))
            if not asked.tools:
                print("   got", ask(model, tokenizer, asked.messages[0]["content"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=200, help="items per task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", choices=sorted(llama.FOLDERS))
    parser.add_argument("--ask", metavar="QUESTION", help="answer this instead")
    parser.add_argument(
        "--failures", choices=sorted(EVALUATED), help="show what goes wrong instead"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sizes = [options.size] if options.size else list(llama.FOLDERS)
    loaded = {}
    for size in sizes:
        folder = EMBEDDED / llama.FOLDERS[size]
        loaded[size] = (llama.load(folder), tokenizer_of(folder))
    for size, (model, tokenizer) in loaded.items():
        if options.ask:
            print(f"{size}: {ask(model, tokenizer, options.ask)}")
        elif options.failures:
            failures(model, tokenizer, options.failures, options.count)
    if options.ask or options.failures:
        return
    print("| task | " + " | ".join(sizes) + " |\n|---|" + "---|" * len(sizes))
    for name in EVALUATED:
        shares = [accuracy(*loaded[size], name, options.count) for size in sizes]
        print(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
