"""How one step's token budget is divided."""

from __future__ import annotations

BATCH_SHARE = 0.1
"""Of the tokens that are computed while somebody waits for an answer, for lines of batches."""


def share_budget(budget: int, left: list[int]) -> list[int]:
    """Tokens that each running sequence gets of this step's `budget`.

    `left[i]` >= 1 is how many known tokens sequence i still has to compute; the sequences are in
    the order in which they keep their place. Needs budget >= len(left).

    - Who has one token left (every decode) gets it.
    - Of the rest, half is split equally among the prompts, so that each goes on in every step,
      and the other half goes to those with the least left: a short prompt passes a long one, and
      several of the same length finish one after another instead of all late.

    Sum <= budget, 1 <= result[i] <= left[i], and nothing is held back that anybody could use.
    """
    assert budget >= len(left)
    sizes = [1] * len(left)
    prompts = [i for i, tokens in enumerate(left) if tokens > 1]
    if not prompts:
        return sizes
    rest = budget - len(left)
    equal = rest // 2 // len(prompts)
    for i in prompts:
        more = min(equal, left[i] - 1)
        sizes[i] += more
        rest -= more
    for i in sorted(prompts, key=left.__getitem__):  # stable: equals in the order given
        more = min(rest, left[i] - sizes[i])
        sizes[i] += more
        rest -= more
    return sizes


class BatchShare:
    """What lines of batches get of steps that others need too: a tenth of the others' tokens.

    So a batch makes an answer at most about a tenth slower, and gets on under any load. The share
    is kept as a credit, because a step of one token has no tenth.
    """

    def __init__(self) -> None:
        self._credit = 0.0

    def divide(self, budget: int, others: list[int], lines: list[int]) -> list[int]:
        """The sizes of `others`, then those of `lines`; the arguments are `share_budget`'s, and a
        line's size may be 0."""
        if not others:
            return share_budget(budget, lines)
        if not lines:
            return share_budget(budget, others)
        ours = min(int(self._credit), sum(lines), budget - len(others))
        taken = lines[:ours]
        sizes = share_budget(budget - ours, others)
        self._credit += BATCH_SHARE * sum(sizes)
        of_lines = share_budget(ours, taken) if taken else []
        # What nobody has used does not add up to a step of lines alone.
        self._credit = min(self._credit - sum(of_lines), 1.0 + BATCH_SHARE * budget)
        return [*sizes, *of_lines, *[0] * (len(lines) - len(taken))]
