"""How one step's token budget is divided. Pure arithmetic, no state."""

from __future__ import annotations


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
