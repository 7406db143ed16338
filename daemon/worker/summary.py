"""What a comparison's scores per token come to: means, their uncertainty, quantiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("nll_a", "nll_b", "kl", "same_first", "shared_five")
"""Scores of a predicted token: -log p by A and by B, KL(A||B) in nats, whether the most likely
token is the same, and which share of A's five most likely B has among its own."""

_NORMAL_95 = 1.959964
_POINTS = 200
"""Steps of the curve of quantiles."""


def summary(scores: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """`scores` by KINDS, [windows, tokens]. An interval is the 95 % one of a normal mean over the
    windows, which unlike neighbouring tokens are nearly independent; None for one window."""
    nll_a, nll_b, kl = scores["nll_a"], scores["nll_b"], scores["kl"]
    points = np.quantile(kl, np.linspace(0, 1, _POINTS + 1))
    return {
        "perplexity_a": _exp(interval(nll_a)),
        "perplexity_b": _exp(interval(nll_b)),
        # Of the differences: what is hard for A is hard for B, so these vary far less.
        "perplexity_ratio": _exp(interval(nll_b - nll_a)),
        "kl": interval(kl)
        | {
            "median": float(np.median(kl)),
            "p90": float(np.quantile(kl, 0.9)),
            "p99": float(np.quantile(kl, 0.99)),
            "max": float(kl.max()),
        },
        "kl_quantiles": points.tolist(),
        "same_first": interval(scores["same_first"]),
        "shared_five": interval(scores["shared_five"]),
    }


def interval(values: NDArray[np.float64]) -> dict[str, float | None]:
    """The mean of [windows, tokens], and the interval in which it is by its windows' spread."""
    mean = float(values.mean())
    means = values.mean(axis=1)
    if len(means) < 2:
        return {"value": mean, "low": None, "high": None}
    half = _NORMAL_95 * float(means.std(ddof=1)) / math.sqrt(len(means))
    return {"value": mean, "low": mean - half, "high": mean + half}


def _exp(of: dict[str, float | None]) -> dict[str, float | None]:
    """Perplexities beyond a double are refused by json, so they end at e^700."""
    return {key: None if x is None else math.exp(min(x, 700.0)) for key, x in of.items()}
