"""What a request gets does not depend on what else runs (fp32, the real process)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from harness import Daemon

QUESTIONS = [
    "What is {a} + {b}?",
    "Sort these numbers: {a}, {b}, 17",
    "Convert {a} km to m",
    "Reverse this list: red, {a}, blue, {b}",
]


def bodies(count: int, **extra: Any) -> list[dict[str, Any]]:
    return [
        {
            "model": "demo",
            "messages": [
                {"role": "user", "content": QUESTIONS[i % 4].format(a=3 * i + 2, b=90 - 2 * i)}
            ],
            "max_tokens": 16 + 3 * i,
            "ignore_eos": True,
            **{key: value(i) if callable(value) else value for key, value in extra.items()},
        }
        for i in range(count)
    ]


def text(daemon: Daemon, body: dict[str, Any]) -> str:
    answer = daemon.post("/v1/chat/completions", body)
    assert answer["usage"]["completion_tokens"] == body["max_tokens"]
    content: str = answer["choices"][0]["message"]["content"]
    return content


def together(daemon: Daemon, requests: list[dict[str, Any]]) -> list[str]:
    """All are there before the first is computed."""
    daemon.wait_requests(0)
    with ThreadPoolExecutor(len(requests)) as threads:
        with daemon.held():
            texts = [threads.submit(text, daemon, body) for body in requests]
            daemon.wait_requests(len(requests))
        return [text.result() for text in texts]


def test_64_greedy_requests_at_once_equal_each_alone(demo: Daemon) -> None:
    requests = [body | {"max_tokens": 16 + i} for i, body in enumerate(bodies(64, temperature=0))]
    alone = [text(demo, body) for body in requests]
    assert together(demo, requests) == alone


def test_32_seeded_requests_at_once_equal_each_alone(demo: Daemon) -> None:
    requests = bodies(32, temperature=1.3, top_p=0.95, seed=lambda i: 1000 + i)
    alone = [text(demo, body) for body in requests]
    assert together(demo, requests) == alone
    assert len(set(alone)) > 16


def test_seeds_say_the_same_to_another_process_and_with_a_prefix_that_is_known(
    demo: Daemon, serve: Callable[..., Daemon]
) -> None:
    requests = bodies(8, temperature=1.3, seed=lambda i: 2000 + i)
    expected = together(demo, requests)
    daemon = serve("demo", "--dtype", "float32", "--threads", "1")
    # In another order, then once more with all of their prompts cached.
    assert together(daemon, requests[::-1]) == expected[::-1]
    assert [text(daemon, body) for body in requests] == expected
    assert daemon.metric("quantd_prefix_hit_tokens_total") > 0


def test_a_pool_so_small_that_requests_are_preempted(
    demo: Daemon, serve: Callable[..., Daemon]
) -> None:
    greedy = bodies(8, temperature=0, max_tokens=120)
    seeded = bodies(8, temperature=1.3, seed=lambda i: 1000 + i, max_tokens=120)
    alone = [text(demo, body) for body in greedy + seeded]
    # Room for 256 tokens: a few requests fit at first, and then they grow.
    tiny = serve("demo", "--dtype", "float32", "--threads", "1", "--kv-bytes", "2MiB")
    assert together(tiny, greedy + seeded) == alone
    assert tiny.metric("quantd_preemptions_total") >= 3
    tiny.wait_metric('quantd_kv_blocks{state="used"}', 0)
