"""Counting, and that what a scrape shows is what was counted."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from quantd.daemon.kv.stats import DIRECTIONS, KvStats
from quantd.daemon.telemetry.metrics import Histogram, Metrics, ModelSample


def scrape(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """(sample name, labels) → value."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def labels(**pairs: str) -> frozenset[tuple[str, str]]:
    return frozenset(pairs.items())


@pytest.fixture
def busy() -> Metrics:
    metrics = Metrics()
    engine = metrics.engine('odd "name"\\')
    engine.count_prompt(10, 4)
    engine.count_generated(3)
    engine.count_finished("stop")
    engine.count_finished("stop")
    engine.count_finished("abort")
    engine.observe_queue(0.003)
    engine.observe_ttft(0.2)
    engine.observe_itl(1000.0)
    engine.observe_step(0.5, 7)
    engine.count_masks(3, 0.25, 0.125)
    engine.count_preempted("memory", 8)
    engine.count_preempted("priority", 0)
    engine.count_moved("out", "host", 1000)
    engine.count_moved("out", "host", 24)
    engine.count_returned("copy", 11)
    metrics.watch(
        lambda: [
            ModelSample(
                model="a",
                state="ready",
                requests_running=2,
                requests_waiting=3,
                kv=KvStats(
                    trimmed=0,
                    block_bytes=100,
                    free=5,
                    used=6,
                    cached=7,
                    host_free=1,
                    host_cached=2,
                    disk_free=3,
                    disk_cached=4,
                    moved_blocks={f"{way}_{tier}": 10 for way, tier in DIRECTIONS},
                    fetches=11,
                    recomputes=12,
                    nodes=0,
                    disk_problem=None,
                ),
            ),
            ModelSample(model="b", state="loading"),
        ]
    )
    return metrics


def test_a_scrape_shows_what_was_counted(busy: Metrics) -> None:
    values = scrape(busy)
    odd = {"model": 'odd "name"\\'}
    assert values["quantd_prompt_tokens_total", labels(**odd)] == 10
    assert values["quantd_prefix_hit_tokens_total", labels(**odd)] == 4
    assert values["quantd_generation_tokens_total", labels(**odd)] == 3
    assert values["quantd_requests_total", labels(**odd, outcome="stop")] == 2
    assert values["quantd_requests_total", labels(**odd, outcome="abort")] == 1
    assert values["quantd_preemptions_total", labels(**odd, reason="memory")] == 8
    assert values["quantd_preemptions_total", labels(**odd, reason="priority")] == 0
    assert values["quantd_spill_bytes_total", labels(**odd, direction="out", tier="host")] == 1024
    assert values["quantd_kv_return_total", labels(**odd, how="copy")] == 11
    assert values["quantd_steps_total", labels(**odd)] == 1
    assert values["quantd_step_tokens_total", labels(**odd)] == 7
    assert values["quantd_step_seconds_total", labels(**odd)] == 0.5
    assert values["quantd_queue_seconds_bucket", labels(**odd, le="0.0025")] == 0
    assert values["quantd_queue_seconds_bucket", labels(**odd, le="0.005")] == 1
    assert values["quantd_ttft_seconds_sum", labels(**odd)] == 0.2
    assert values["quantd_itl_seconds_bucket", labels(**odd, le="5.0")] == 0
    assert values["quantd_itl_seconds_bucket", labels(**odd, le="+Inf")] == 1
    assert values["quantd_itl_seconds_count", labels(**odd)] == 1


def test_gauges_are_of_the_moment(busy: Metrics) -> None:
    values = scrape(busy)
    assert values["quantd_requests_running", labels(model="a")] == 2
    assert values["quantd_requests_waiting", labels(model="a")] == 3
    for state, count in (("free", 5), ("used", 6), ("cached", 7)):
        key = labels(model="a", tier="device", state=state)
        assert values["quantd_kv_blocks", key] == count
    assert values["quantd_model_state", labels(model="a", state="ready")] == 1
    assert values["quantd_model_state", labels(model="a", state="cold")] == 0
    assert values["quantd_model_state", labels(model="b", state="loading")] == 1
    assert ("quantd_requests_running", labels(model="b")) not in values, "it has no engine"
    busy.watch(tuple)
    assert ("quantd_requests_running", labels(model="a")) not in scrape(busy)


def test_the_process_itself_is_shown() -> None:
    values = scrape(Metrics())
    assert values["process_resident_memory_bytes", frozenset()] > 1 << 20
    assert values["process_cpu_seconds_total", frozenset()] > 0


def test_counters_outlive_the_engine() -> None:
    metrics = Metrics()
    metrics.engine("a").count_generated(1)
    metrics.engine("a").count_generated(1)
    assert scrape(metrics)["quantd_generation_tokens_total", labels(model="a")] == 2


@given(st.lists(st.floats(0, 20), max_size=50))
def test_histogram_against_counting(values: list[float]) -> None:
    bounds = (0.5, 1.0, 10.0)
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    expected = [(str(b), sum(v <= b for v in values)) for b in bounds] + [("+Inf", len(values))]
    assert histogram.cumulative() == expected
    assert histogram.sum == pytest.approx(sum(values))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say(busy: Metrics) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=busy.render(), capture_output=True
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def test_the_library_is_not_imported_before_the_first_scrape() -> None:
    code = (
        "import sys; from quantd.daemon.telemetry.metrics import Metrics; m = Metrics();"
        "m.engine('a').observe_itl(1.0); sys.exit('prometheus_client' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
