"""The sampler draws from the distribution that its parameters describe.

The exact distribution is computed here independently, in numpy and float64, by a full sort. The
same statistical test is turned on samplers with known mistakes, and must refuse each: otherwise
its acceptance of ours would mean nothing. All seeds are fixed, so outcomes are too.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantd.daemon.types import SamplingParams
from quantd.daemon.worker.sampler import Sampler, SampleRow
from quantd.kernels.reference.sampling import philox_uniform

VOCAB = 24
NUM_DRAWS = 3000
LOGITS = np.random.default_rng(7).normal(0.0, 2.0, VOCAB).astype(np.float32)
PROMPT = [3, 3, 5, 8]
OUTPUT = [5, 5, 5, 9, int(LOGITS.argmax())]
TOKENS = PROMPT + OUTPUT


def softmax(z: np.ndarray) -> np.ndarray:
    weights = np.exp(z - z.max())
    return weights / weights.sum()


def penalized(params: SamplingParams, presence_over: list[int] = OUTPUT) -> np.ndarray:
    logits = LOGITS.astype(np.float64)
    for token, bias in params.logit_bias:
        logits[token] += bias
    for token in set(TOKENS):
        divide = logits[token] > 0
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if divide else logits[token] * factor
    for token in OUTPUT:
        logits[token] -= params.frequency_penalty
    for token in set(presence_over):
        logits[token] -= params.presence_penalty
    return logits


def filtered(
    probabilities: np.ndarray, params: SamplingParams, *, with_crossing: bool = True
) -> np.ndarray:
    kept = probabilities * (probabilities >= params.min_p * probabilities.max())
    order = np.argsort(-kept, kind="stable")
    if params.top_k:
        kept[order[params.top_k :]] = 0.0
    kept /= kept.sum()
    if params.top_p < 1:
        sums = np.cumsum(kept[order])
        before = np.concatenate([[0.0], sums[:-1]])
        num = int((before < params.top_p).sum()) if with_crossing else int((sums < 0.9).sum())
        kept[order[max(num, 1) :]] = 0.0
    return kept / kept.sum()


def exact(params: SamplingParams) -> np.ndarray:
    return filtered(softmax(penalized(params) / params.temperature), params)


def draws(params: SamplingParams) -> np.ndarray:
    """Counts of NUM_DRAWS tokens, one per seed, from the real sampler in batches."""
    rows = [
        SampleRow(seed, replace(params, seed=seed), TOKENS, len(PROMPT))
        for seed in range(NUM_DRAWS)
    ]
    logits = torch.from_numpy(LOGITS).expand(NUM_DRAWS, -1)
    sampled = Sampler(VOCAB).sample(logits, rows)
    return np.bincount([s.token for s in sampled], minlength=VOCAB)


def replace(params: SamplingParams, **changes: object) -> SamplingParams:
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    return SamplingParams(**(fields | changes))  # type: ignore[arg-type]


def misfit(counts: np.ndarray, distribution: np.ndarray) -> str | None:
    """Why the counts cannot be from the distribution, or None: support, chi-square at p = 0.01
    with rare tokens pooled until 5 are expected, total variation."""
    total = counts.sum()
    if counts[distribution == 0].any():
        return "a token that is excluded was drawn"
    order = np.argsort(-distribution, kind="stable")
    observed, expected = counts[order].astype(float), distribution[order] * total
    frequent = int((expected >= 5).sum())
    observed = np.append(observed[:frequent], observed[frequent:].sum())
    expected = np.append(expected[:frequent], expected[frequent:].sum())
    if expected[-1] < 5:
        observed = np.append(observed[:-2], observed[-2:].sum())
        expected = np.append(expected[:-2], expected[-2:].sum())
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = max(len(expected) - 1, 1)
    p = float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2)))
    if p < 0.01:
        return f"chi-square p = {p:.2g}"
    variation = 0.5 * float(np.abs(counts / total - distribution).sum())
    if variation > np.sqrt(VOCAB / total):
        return f"total variation = {variation:.3f}"
    return None


FILTERS: dict[str, dict[str, object]] = {
    "plain": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "all filters": {"top_k": 8, "top_p": 0.8, "min_p": 0.02},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.4,
    },
    "bias": {"logit_bias": ((0, 3.0), (7, -2.0))},
    "everything": {
        "top_p": 0.95,
        "top_k": 12,
        "repetition_penalty": 0.8,
        "presence_penalty": -1.0,
        "logit_bias": ((2, 1.5),),
    },
}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("name", FILTERS)
def test_draws_fit_the_exact_distribution(name: str, temperature: float) -> None:
    params = SamplingParams(1, temperature=temperature, **FILTERS[name])  # type: ignore[arg-type]
    assert misfit(draws(params), exact(params)) is None


def broken_draws(distribution: np.ndarray, bend: float = 1.0) -> np.ndarray:
    cdf = np.cumsum(distribution)
    uniform = np.array([philox_uniform(seed, len(TOKENS)) ** bend for seed in range(NUM_DRAWS)])
    tokens = np.searchsorted(cdf, uniform * cdf[-1], side="right")
    return np.bincount(tokens, minlength=VOCAB)


def test_the_test_accepts_the_exact_distribution() -> None:
    params = SamplingParams(1, temperature=1.7, top_p=0.9, presence_penalty=1.0)
    assert misfit(broken_draws(exact(params)), exact(params)) is None


def test_the_test_refuses_top_p_without_the_crossing_token() -> None:
    params = SamplingParams(1, temperature=1.7, top_p=0.9)
    wrong = filtered(softmax(penalized(params) / 1.7), params, with_crossing=False)
    assert misfit(broken_draws(wrong), exact(params)) is not None


def test_the_test_refuses_temperature_after_top_p() -> None:
    params = SamplingParams(1, temperature=1.7, top_p=0.9)
    with np.errstate(divide="ignore"):
        wrong = softmax(np.log(filtered(softmax(penalized(params)), params)) / 1.7)
    assert misfit(broken_draws(wrong), exact(params)) is not None


def test_the_test_refuses_a_biased_uniform() -> None:
    params = SamplingParams(1, temperature=1.0)
    assert misfit(broken_draws(exact(params), bend=1.15), exact(params)) is not None


def test_the_test_refuses_presence_penalty_over_the_prompt() -> None:
    params = SamplingParams(1, temperature=1.7, presence_penalty=2.0)
    wrong = softmax(penalized(params, presence_over=TOKENS) / 1.7)
    assert misfit(broken_draws(wrong), exact(params)) is not None


def test_the_test_refuses_penalties_after_temperature() -> None:
    params = SamplingParams(1, temperature=1.7, presence_penalty=2.0)
    no_penalty = replace(params, presence_penalty=0.0)
    logits = penalized(no_penalty) / 1.7
    for token in set(OUTPUT):
        logits[token] -= 2.0
    assert misfit(broken_draws(softmax(logits)), exact(params)) is not None
