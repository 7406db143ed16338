"""Train the embedded model and its draft, and export both into daemon/embedded/.

    python examples/demo_model/train.py                # base, draft; a tokenizer if none is there
    python examples/demo_model/train.py --size draft   # one of them

Deterministic for a given --seed and --threads. A run that was interrupted goes on from the last
checkpoint under --work.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import model as llama
import tokenizer as tokens
import torch
import torch.nn.functional as F
from data import END, PAD
from lessons import PHASES, lesson
from tokenizers import Tokenizer
from torch import Tensor, nn

EMBEDDED = Path(__file__).resolve().parents[2] / "daemon" / "embedded"
STEPS = {size: phases[-1][0] for size, phases in PHASES.items()}
DECAY_STEPS = {"base": 200, "draft": 100}
WARM_UP = 60
AVERAGE = 0.98  # what is exported is the running average of the weights
MUON_RATE, ADAM_RATE = 0.02, 0.004
SAVE_EVERY = 25
# A processor without such arithmetic emulates it, ten times slower than float32.
COMPUTE = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


class Muon:
    """Momentum whose step is made orthogonal by Newton-Schulz iterations (Jordan et al., 2024).

    For matrices of the hidden layers only. Matrices of one shape are treated as one batch.
    """

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95) -> None:
        self._momentum = momentum
        self._groups: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            self._groups.setdefault(parameter.shape, []).append(parameter)
        self.buffers = {s: torch.zeros(len(g), *s) for s, g in self._groups.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, group in self._groups.items():
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            buffer = self.buffers[shape]
            buffer.lerp_(gradient, 1 - self._momentum)
            update = orthogonal(gradient.lerp(buffer, self._momentum))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, u in zip(group, update, strict=True):
                parameter.add_(u.to(parameter.dtype), alpha=-rate * scale)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Roughly U Vᵀ of each matrix in [n, rows, cols]; the quintic's published coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    y: Tensor = (x.mT if tall else x).to(COMPUTE)
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if tall else y


class Run:
    """A training run: the model, both optimizers, and the step they are at."""

    def __init__(self, size: str, seed: int, tokenizer: Tokenizer) -> None:
        torch.manual_seed(seed)
        self.size, self.seed, self.tokenizer = size, seed, tokenizer
        self.model = llama.Llama(llama.SHAPES[size])
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.step = self.start = 0
        self.seconds = 0.0
        matrices = [p for n, p in self.model.named_parameters() if n.endswith("_proj.weight")]
        others = [p for n, p in self.model.named_parameters() if not n.endswith("_proj.weight")]
        self.muon = Muon(matrices)
        self.adam = torch.optim.Adam(others, lr=ADAM_RATE, betas=(0.9, 0.98), fused=True)

    def rate(self) -> float:
        """Linear warm-up, a plateau that halves after the first phase, a linear decay."""
        plateau = 1.0 if self.step < PHASES[self.size][0][0] else 0.5
        left = (STEPS[self.size] - self.step) / DECAY_STEPS[self.size]
        return plateau * min(1.0, (self.step - self.start + 1) / WARM_UP, max(left, 0.02))

    def advance(self) -> tuple[float, int]:
        """One optimizer step: the mean loss per learnt token, and the number of tokens read."""
        parts = list(lesson(self.tokenizer, self.size, self.seed, self.step))
        learnt = sum(int(learn[:, 1:].sum()) for _, learn in parts)
        loss_sum, num_tokens = 0.0, 0
        for ids, learn in parts:
            where = F.pad(learn[:, 1:], (0, 1))
            with torch.autocast("cpu", torch.bfloat16, enabled=COMPUTE == torch.bfloat16):
                logits = self.model(ids, where)
            loss = F.cross_entropy(logits.float(), ids[learn & _after_first(ids)], reduction="sum")
            torch.autograd.backward(loss / learnt)
            loss_sum += loss.item()
            num_tokens += ids.numel()
        self.adam.param_groups[0]["lr"] = ADAM_RATE * self.rate()
        self.adam.step()
        self.muon.step(MUON_RATE * self.rate())
        self.model.zero_grad(set_to_none=True)
        for name, parameter in self.model.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1 - AVERAGE)
        self.step += 1
        return loss_sum / learnt, num_tokens

    def begin_at(self, step: int) -> None:
        """From the exported weights, as if they were those of this step; optimizers anew."""
        exported = llama.load(EMBEDDED / llama.FOLDERS[self.size]).state_dict()
        self.model.load_state_dict(exported)
        self.average = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.step = self.start = step

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "adam": self.adam.state_dict(),
            "muon": {tuple(s): b for s, b in self.muon.buffers.items()},
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def restore(self, path: Path) -> None:
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.adam.load_state_dict(state["adam"])
        for shape, buffer in state["muon"].items():
            self.muon.buffers[torch.Size(shape)].copy_(buffer)
        self.step, self.seconds = state["step"], state["seconds"]


def _after_first(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    return mask


def export(run: Run) -> None:
    folder = EMBEDDED / llama.FOLDERS[run.size]
    ids = run.tokenizer.get_vocab()
    llama.save(run.model.shape, run.average, folder, eos=ids[END], pad=ids[PAD])
    tokens.save(run.tokenizer, folder)


def train(size: str, seed: int, tokenizer: Tokenizer, work: Path, start: int = 0) -> None:
    run = Run(size, seed, tokenizer)
    checkpoint = work / f"{size}.pt"
    if checkpoint.exists():
        run.restore(checkpoint)
    elif start:
        run.begin_at(start)
    count = sum(p.numel() for p in run.model.parameters())
    print(f"{size}: {count:,} parameters, from step {run.step} of {STEPS[size]}", flush=True)
    mean, read, began = math.nan, 0, time.perf_counter()
    while run.step < STEPS[size]:
        loss, num_tokens = run.advance()
        mean = loss if math.isnan(mean) else 0.95 * mean + 0.05 * loss
        read += num_tokens
        if run.step % 20 == 0:
            speed = read / (time.perf_counter() - began)
            print(f"{size} {run.step} loss {mean:.4f} {speed:.0f} tokens/s", flush=True)
        if run.step % SAVE_EVERY == 0 or run.step == STEPS[size]:
            run.seconds += time.perf_counter() - began
            read, began = 0, time.perf_counter()
            run.save(checkpoint)
            export(run)
    print(f"{size}: {run.seconds / 60:.0f} minutes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(STEPS), help="only this one (default: both)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/demo_model"), help="checkpoints")
    parser.add_argument(
        "--start", type=int, default=0, help="go on from the exported weights at this step"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    exported = EMBEDDED / llama.FOLDERS["base"]
    # Weights are tied to their tokenizer, so one that is there is kept.
    tokenizer = tokens.load(exported) if exported.exists() else tokens.train()
    for size in [options.size] if options.size else ["base", "draft"]:
        train(size, options.seed, tokenizer, options.work, options.start)


if __name__ == "__main__":
    main()
