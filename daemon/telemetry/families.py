"""The metrics' names, types and help texts. Imported at the first scrape, never at start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from quantd.daemon.telemetry.metrics import MODEL_STATES, EngineMetrics, Histogram, ModelSample

_COUNTERS: tuple[tuple[str, str, Callable[[EngineMetrics], float]], ...] = (
    (
        "quantd_prompt_tokens",
        "Prompt tokens of started requests, cached ones included.",
        lambda engine: engine.prompt_tokens,
    ),
    (
        "quantd_prefix_hit_tokens",
        "Prompt tokens whose KV blocks were found and not computed.",
        lambda engine: engine.cached_tokens,
    ),
    ("quantd_generation_tokens", "Generated tokens.", lambda engine: engine.generated_tokens),
    ("quantd_steps", "Steps run.", lambda engine: engine.steps),
    (
        "quantd_step_tokens",
        "Tokens computed in steps, prompt and output together.",
        lambda engine: engine.step_tokens,
    ),
    ("quantd_step_seconds", "Time spent in steps.", lambda engine: engine.step_seconds),
    (
        "quantd_tool_call_retries",
        "Answers that were made again because a tool call in them was not valid.",
        lambda engine: engine.tool_call_retries,
    ),
    (
        "quantd_grammar_masks",
        "Tokens sampled under a grammar.",
        lambda engine: engine.masks,
    ),
    (
        "quantd_grammar_mask_seconds",
        "Time spent on grammars' masks, beside the model.",
        lambda engine: engine.mask_seconds,
    ),
    (
        "quantd_grammar_wait_seconds",
        "Of the time in steps, waited for masks.",
        lambda engine: engine.mask_wait_seconds,
    ),
)
_Labelled = Callable[[EngineMetrics], Mapping[tuple[str, ...], int]]
_LABELLED: tuple[tuple[str, str, tuple[str, ...], _Labelled], ...] = (
    (
        "quantd_requests",
        "Finished requests by how they ended.",
        ("outcome",),
        lambda engine: _by_word(engine.finished),
    ),
    (
        "quantd_preemptions",
        "Running requests that had to give up their place, by what it was needed for.",
        ("reason",),
        lambda engine: _by_word(engine.preempted),
    ),
    (
        "quantd_spill_bytes",
        "KV bytes moved out to a lower tier, or back in from it.",
        ("direction", "tier"),
        lambda engine: engine.moved_bytes,
    ),
    (
        "quantd_kv_return",
        "Requests that found spilled KV blocks, by how they got them back.",
        ("how",),
        lambda engine: _by_word(engine.returned),
    ),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[EngineMetrics], Histogram]], ...] = (
    (
        "quantd_queue_seconds",
        "From a request's arrival to its first step.",
        lambda engine: engine.queue,
    ),
    (
        "quantd_ttft_seconds",
        "From a request's arrival to its first token.",
        lambda engine: engine.ttft,
    ),
    (
        "quantd_itl_seconds",
        "Between a request's successive tokens.",
        lambda engine: engine.itl,
    ),
)


def _by_word(counts: Mapping[str, int]) -> Mapping[tuple[str, ...], int]:
    return {(word,): count for word, count in counts.items()}


def families(
    engines: Mapping[str, EngineMetrics], samples: Sequence[ModelSample]
) -> Iterator[Metric]:
    """Everything that a scrape shows beside the process's own numbers."""
    for name, help_text, value in _COUNTERS:
        counter = CounterMetricFamily(name, help_text, labels=["model"])
        for model, engine in engines.items():
            counter.add_metric([model], value(engine))
        yield counter
    for name, help_text, labels, counts in _LABELLED:
        counter = CounterMetricFamily(name, help_text, labels=["model", *labels])
        for model, engine in engines.items():
            for values, count in counts(engine).items():
                counter.add_metric([model, *values], count)
        yield counter
    for name, help_text, histogram in _HISTOGRAMS:
        family = HistogramMetricFamily(name, help_text, labels=["model"])
        for model, engine in engines.items():
            chosen = histogram(engine)
            family.add_metric([model], chosen.cumulative(), chosen.sum)
        yield family
    yield from _gauges(samples)


def safety_families(
    found: Mapping[tuple[str, ...], int], failures: Mapping[tuple[str, ...], int]
) -> Iterator[Metric]:
    """What the safety filter has found, and what its guards have not told."""
    for name, help_text, labels, counts in (
        (
            "quantd_safety",
            "Prompts and answers in which the safety filter has found a category.",
            ("policy", "stage", "action", "category"),
            found,
        ),
        (
            "quantd_safety_guard_failures",
            "Judgements a guard failed at.",
            ("guard",),
            failures,
        ),
    ):
        counter = CounterMetricFamily(name, help_text, labels=labels)
        for values, count in counts.items():
            counter.add_metric(values, count)
        yield counter


def _gauges(samples: Sequence[ModelSample]) -> Iterator[Metric]:
    running = GaugeMetricFamily(
        "quantd_requests_running", "Requests in the batch.", labels=["model"]
    )
    waiting = GaugeMetricFamily(
        "quantd_requests_waiting", "Requests waiting for a place.", labels=["model"]
    )
    blocks = GaugeMetricFamily(
        "quantd_kv_blocks",
        "KV blocks: used by requests, cached (evictable), or free.",
        labels=["model", "tier", "state"],
    )
    states = GaugeMetricFamily(
        "quantd_model_state", "1 for the state that the model is in.", labels=["model", "state"]
    )
    for sample in samples:
        for state in MODEL_STATES:
            states.add_metric([sample.model, state], float(sample.state == state))
        if sample.state != "ready":
            continue
        running.add_metric([sample.model], sample.requests_running)
        waiting.add_metric([sample.model], sample.requests_waiting)
        kv = sample.kv
        if kv is None:
            continue
        for tier, kind, count in (
            ("device", "free", kv.free),
            ("device", "used", kv.used),
            ("device", "cached", kv.cached),
            ("host", "free", kv.host_free),
            ("host", "cached", kv.host_cached),
            ("disk", "free", kv.disk_free),
            ("disk", "cached", kv.disk_cached),
        ):
            blocks.add_metric([sample.model, tier, kind], count)
    return iter((running, waiting, blocks, states))
