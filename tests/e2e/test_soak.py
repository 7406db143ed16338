"""The soak in short: random load over all tiers, every answer compared with the same one alone."""

from __future__ import annotations

import soak


def test_random_load_for_a_few_seconds() -> None:
    """Priorities displace, so blocks leave and come back; the other policies in the long run."""
    for seconds in (8, 40, 120):  # in eight little comes about on a machine that is busy
        (outcome,) = soak.run(seconds=seconds, policies=["priority"], seed=3, num_questions=24)
        assert [line for line in outcome.wrong if line != soak.NEVER_FULL] == []
        if outcome.wrong == [] and outcome.counts["answered"] >= 10:
            break
    assert outcome.wrong == []
    assert outcome.counts["answered"] >= 10 and outcome.counts["recounts"] >= 2
    assert outcome.kv["moved_blocks"]["out_host"] > 0, "nothing was ever short"
