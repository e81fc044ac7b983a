"""A worker process: ``python -m zqfp_compile.parallel.worker DESCRIPTOR``.

It takes (function, item) pairs from the socket DESCRIPTOR and answers each with an ``Outcome``; it ends with
its parent, whatever ends that.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

from zqfp_compile.parallel.executor import attempt

_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Work until the other side closes the socket ``arguments[0]``."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with Connection(int(arguments[0])) as channel:
        try:
            while True:
                work, item = channel.recv()
                channel.send(attempt(work, item))
        except (EOFError, ConnectionError):  # the parent has gone
            return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
