"""The embedded model in each format that can be made while it loads: task accuracy and divergence.

    python benchmarks/formats.py            # 100 held-out items of each task

An item counts when greedy decoding gives the expected answer to the last character (one forward
pass over question and answer decides it, see examples/demo_model/evaluate.py). KL is the mean over
the answers' tokens of KL(float32 || format), in nats.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo_model"
sys.path.insert(0, str(DEMO))

import evaluate  # noqa: E402
from data import EVALUATED, question  # noqa: E402

from quantd.daemon.types import BLOCK_TOKENS, LoadModel  # noqa: E402
from quantd.daemon.worker.load import Model, load_model  # noqa: E402
from quantd.kernels import ops  # noqa: E402

FORMATS = ("dense", "int8", "w8a8", "int4")
Item = tuple[list[int], int]


def answers(model: Model, item: Item) -> Tensor:
    """fp32 [length of the answer, vocabulary]: log-probabilities where the answer is predicted."""
    ids, length = item
    count = len(ids)
    blocks = -(-count // BLOCK_TOKENS)
    positions = torch.arange(count)
    batch = ops.AttentionBatch(
        query_start=torch.tensor([0, count], dtype=torch.int32),
        kv_len=torch.tensor([count], dtype=torch.int32),
        block_table=torch.arange(blocks, dtype=torch.int32)[None],
        slots=positions.clone(),
        positions=positions,
    )
    rows = torch.arange(count - length - 1, count - 1)
    hidden = model.decoder.forward(torch.tensor(ids), batch, count, model.pools, rows)
    return model.decoder.logits(hidden).float().log_softmax(dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=100, help="items per task")
    options = parser.parse_args()
    folder = evaluate.EMBEDDED / "demo"
    tokenizer = evaluate.tokenizer_of(folder)
    items = {
        name: [evaluate.encode(tokenizer, question(i, name)) for i in range(options.count)]
        for name in EVALUATED
    }
    exact: dict[str, list[Tensor]] = {}
    print("| format | weights, MB | items right | KL, nats |\n|---|---|---|---|")
    for quantization in FORMATS:
        load = LoadModel(
            name="demo",
            path=str(folder),
            quantization=quantization,
            dtype="float32" if quantization == "dense" else "auto",
        )
        model = load_model(load, lambda progress: None)
        right, total, divergence, tokens = 0, 0, 0.0, 0
        for name, asked in items.items():
            found = [answers(model, item) for item in asked]
            reference = exact.setdefault(name, found)
            for (ids, length), got, want in zip(asked, found, reference, strict=True):
                right += bool((got.argmax(dim=-1) == torch.tensor(ids[-length:])).all())
                total += 1
                divergence += float((want.exp() * (want - got)).sum())
                tokens += length
        size = model.info.weight_bytes / 1e6
        print(
            f"| {quantization} | {size:.1f} | {right / total:.1%} | {divergence / tokens:.5f} |",
            flush=True,
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
