"""``magic-fast`` on a disk that takes its time, for a test that interrupts it.

    python interrupted_merge.py [--stuck] ARGUMENT...

With ``--stuck`` the first tensor is merged by something that heeds no signal for a minute.
"""

from __future__ import annotations

import hashlib
import sys
import time
from contextlib import suppress
from typing import Any

from engine.slow_files import slow_down
from magic_fast.cli import main


def get_stuck() -> None:
    from magic_fast.engine.execute import streamed as stages

    def stuck(*arguments: Any) -> None:
        told, until = False, time.monotonic() + 60
        while time.monotonic() < until:
            with suppress(KeyboardInterrupt):  # it may come before the call has begun
                if not told:
                    told = True
                    print("stuck", file=sys.stderr, flush=True)
                hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)  # in C, without a break

    stages.Streamed.__call__ = stuck  # type: ignore[method-assign]


if __name__ == "__main__":
    slow_down()
    if sys.argv[1] == "--stuck":
        get_stuck()
    sys.exit(main([a for a in sys.argv[1:] if a != "--stuck"]))
