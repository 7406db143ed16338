"""Two models over one text, in one pass: the torch half of `eval`.

`python -m quantd.daemon.worker.evaluate`, by the protocol of `child.py`. The request has `a` and
`b` (fields of LoadModel), `tokens`, `head` (tokens before each window, such as BOS), `context` and
`windows` (None: as many as there are), `layers`.

The text is cut into windows that do not overlap; in each, all tokens but the first are predicted.
Distributions are over the ids that may be sampled. No logits are kept: memory is that of both
models, of the hidden states of a few windows and of 64 rows of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantd.daemon.types import BLOCK_TOKENS, LoadModel, LoadProgress
from quantd.daemon.worker import child
from quantd.daemon.worker.checkpoint import open_checkpoint
from quantd.daemon.worker.layer_errors import LayerErrors
from quantd.daemon.worker.load import Model, load_model
from quantd.daemon.worker.models.families import read_config
from quantd.daemon.worker.summary import KINDS, summary
from quantd.kernels import ops
from quantd.plugins.api import Refused

_CONTEXT = 512
"""Tokens of a window when nobody says: what others report perplexities at."""
_BATCH_TOKENS = 2048
_LOGIT_ROWS = 64
_TOP = 5

Scores = dict[str, NDArray[np.float64]]
"""By KINDS: [windows, predicted tokens of a window]."""


@dataclass(frozen=True, slots=True)
class _Side:
    name: str
    model: Model

    def hidden(self, windows: Tensor) -> Tensor:
        """windows int64 [W, N] -> [W * (N - 1), hidden]: of all tokens but each last one."""
        count, length = windows.shape
        tokens = windows.flatten().to(self.model.device)
        batch = _batch(count, length, self.model.device)
        self.model.pools.ensure(batch.block_table.numel())
        hidden = self.model.decoder.forward(tokens, batch, length, self.model.pools, None)
        return hidden.view(count, length, -1)[:, :-1].flatten(0, 1)

    def logprobs(self, hidden: Tensor) -> Tensor:
        """fp32 [n, vocab_size]. Raises Refused when one is not a number."""
        logits = self.model.decoder.logits(hidden.contiguous())
        logprobs = logits[:, : self.model.info.vocab_size].float().log_softmax(dim=-1)
        if not logprobs.isfinite().all():
            raise Refused(f"{self.name} gives logits that are not finite on this text")
        return logprobs


@torch.inference_mode()
def evaluate(request: dict[str, Any], send: child.Send) -> dict[str, Any]:
    """Raises Refused for models that cannot be compared, and for a text that is too short."""
    length = _length(request)
    windows, left_out = _windows(request, length)
    a, b = (
        _Side(name.upper(), _load(request[name], name.upper(), length, send)) for name in ("a", "b")
    )
    if a.model.info.vocab_size != b.model.info.vocab_size:
        raise Refused(
            f"A has a vocabulary of {a.model.info.vocab_size} tokens, B of "
            f"{b.model.info.vocab_size}: they cannot be compared"
        )
    highest = int(windows.max())
    if highest >= a.model.info.vocab_size:
        raise Refused(
            f"the tokenizer gives the token {highest}, but the vocabulary has "
            f"{a.model.info.vocab_size}"
        )
    errors = LayerErrors(a.model, b.model) if request["layers"] else None
    if errors is not None:
        a, b = replace(a, model=errors.a), replace(b, model=errors.b)
    scores = _run(a, b, windows, errors, send)
    result = summary(scores)
    result |= {side.name.lower(): _about(side.model) for side in (a, b)}
    result["windows"], result["context"] = windows.shape
    result["tokens"] = windows.shape[0] * (length - 1)
    result["tokens_left_out"] = left_out
    if errors is not None:
        result["layers"], result["hidden"] = errors.layers(), errors.hidden()
    return result


def _length(request: dict[str, Any]) -> int:
    """Tokens of a window."""
    if request["context"] is not None:
        return int(request["context"])
    paths = {request[side]["path"] for side in ("a", "b")}
    configs = (read_config(open_checkpoint(Path(path)).config) for path in paths)
    return min(_CONTEXT, *(config.default_context for config in configs))


def _windows(request: dict[str, Any], length: int) -> tuple[Tensor, int]:
    """int64 [W, length], and how many tokens at the text's end are in none."""
    tokens, head = request["tokens"], request["head"]
    body = length - len(head)
    if body < 1 or length < 2:
        raise Refused(f"context is {length}, must be at least {max(2, len(head) + 1)}")
    if len(tokens) < body:
        raise Refused(
            f"the text has {len(tokens)} tokens, less than the {body} of one window "
            f"(--context {length})"
        )
    count = len(tokens) // body
    if request["windows"] is not None:
        count = min(count, request["windows"])
    text = torch.tensor(tokens[: count * body]).view(count, body)
    heads = torch.tensor(head, dtype=torch.int64).expand(count, -1)
    return torch.cat([heads, text], dim=1), len(tokens) - count * body


def _load(fields: dict[str, Any], name: str, length: int, send: child.Send) -> Model:
    def on_progress(progress: LoadProgress) -> None:
        done, total = progress.done_bytes, progress.total_bytes
        send({"stage": f"loading {name}", "done": done, "total": total})

    tokens = max(length, _BATCH_TOKENS)
    load = LoadModel(name, max_context=length, token_budget=tokens, **fields)
    try:
        model = load_model(load, on_progress)
    except Refused as error:
        raise Refused(f"{name}: {error}") from error
    if model.pools.num_blocks * BLOCK_TOKENS < length:
        raise MemoryError(
            f"{name}: there is memory for keys and values of "
            f"{model.pools.num_blocks * BLOCK_TOKENS} tokens, less than a window of {length}"
        )
    return model


def _run(
    a: _Side, b: _Side, windows: Tensor, errors: LayerErrors | None, send: child.Send
) -> Scores:
    count, length = windows.shape
    blocks = -(-length // BLOCK_TOKENS)
    room = min(side.model.pools.num_blocks // blocks for side in (a, b))
    step = max(1, min(room, _BATCH_TOKENS // length))
    parts: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for start in range(0, count, step):
        send({"stage": f"{start} of {count} windows", "done": start, "total": count})
        some = windows[start : start + step]
        hidden_a, hidden_b = a.hidden(some), b.hidden(some)
        if errors is not None:
            errors.add_last(hidden_a, hidden_b)
        for scored in _score(a, b, hidden_a, hidden_b, some[:, 1:].flatten()):
            for kind, values in zip(KINDS, scored, strict=True):
                parts[kind].append(values.cpu())
    return {
        kind: torch.cat(values).double().view(count, length - 1).numpy()
        for kind, values in parts.items()
    }


def _score(
    a: _Side, b: _Side, hidden_a: Tensor, hidden_b: Tensor, targets: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """In the order of KINDS, fp32 [n] each, for some rows after the other."""
    for start in range(0, len(targets), _LOGIT_ROWS):
        rows = slice(start, start + _LOGIT_ROWS)
        logs_a = a.logprobs(hidden_a[rows])
        logs_b = b.logprobs(hidden_b[rows]).to(logs_a.device)
        target = targets[rows, None].to(logs_a.device)
        kl = (logs_a.exp() * (logs_a - logs_b)).sum(dim=1)
        k = min(_TOP, logs_a.shape[1])
        top_a, top_b = (logs.topk(k, dim=1).indices for logs in (logs_a, logs_b))
        shared = (top_a[:, :, None] == top_b[:, None, :]).any(dim=2).float().mean(dim=1)
        yield (
            -logs_a.gather(1, target)[:, 0],
            -logs_b.gather(1, target)[:, 0],
            # Less than nothing is rounding only.
            kl.clamp_min(0.0),
            (logs_a.argmax(dim=1) == logs_b.argmax(dim=1)).float(),
            shared,
        )


def _batch(count: int, length: int, device: torch.device) -> ops.AttentionBatch:
    """Windows side by side, each in blocks of its own from position 0."""
    blocks = -(-length // BLOCK_TOKENS)
    starts = torch.arange(count + 1, dtype=torch.int32, device=device) * length
    positions = torch.arange(length, device=device).repeat(count)
    first_slots = torch.arange(count, device=device) * blocks * BLOCK_TOKENS
    table = torch.arange(count * blocks, dtype=torch.int32, device=device).view(count, blocks)
    return ops.AttentionBatch(
        starts,
        torch.full((count,), length, dtype=torch.int32, device=device),
        table,
        first_slots.repeat_interleave(length) + positions,
        positions,
    )


def _about(model: Model) -> dict[str, Any]:
    info = model.info
    return {
        "architecture": info.architecture,
        "dtype": info.dtype,
        "device": info.device,
        "weight_bytes": info.weight_bytes,
        "parameters": info.num_parameters,
        "quantizers": info.quantizers,
        "vocab_size": info.vocab_size,
        "notes": info.notes,
    }


if __name__ == "__main__":
    child.main(evaluate)
