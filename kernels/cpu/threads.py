"""How many threads torch may use: one for what is small."""

import torch


class OnCallerThread:
    """torch's operations in this block run on the calling thread alone.

    For operations of less than some hundreds of microseconds. torch's OpenMP threads wait for each
    other at the end of each, and look for more work afterwards: where another program has one of
    the cores that costs whole time slices of the scheduler, and with cores to spare it gains
    little. A class, since a generator takes as long as a small product. Not to be entered twice.
    """

    __slots__ = ("_threads",)

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads()
        if self._threads > 1:
            torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        if self._threads > 1:
            torch.set_num_threads(self._threads)
