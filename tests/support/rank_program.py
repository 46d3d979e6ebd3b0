"""`python -m support.rank_program FAULT train …`: neounify as one rank, with a fault in it."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from neounify import cli
from neounify.train import supervised

FAULT_STEP = 8
"""Call of the loss on rank 1 that fails: of two packs a step, the last of the fourth."""


def main() -> None:
    fault = sys.argv.pop(1)
    original = supervised.loss_of
    calls: list[int] = []
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"

    def loss_of(*arguments: Any) -> Any:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == FAULT_STEP:
            if fault == "memory":
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
            if fault == "once" and first_start:
                os.kill(os.getpid(), signal.SIGKILL)
        if fault == "at once" and first_start:  # before anything is saved
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    supervised.loss_of = loss_of  # type: ignore[assignment]
    cli.main()


if __name__ == "__main__":
    main()
