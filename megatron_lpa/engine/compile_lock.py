"""PyTorch's locks around compiled extensions, which a killed compilation leaves behind for good.

DeepSpeed compiles small operators at their first use. PyTorch lets one process compile and makes the others
wait until a file named ``lock`` is gone, without a limit and without a word.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

STALE_S = 600.0
"""No operator takes that long to compile, so nobody holds a lock of this age."""

_QUIET_S = 30.0
_POLL_S = 0.5


def wait_for_compilers(root: Path | None = None, stale_s: float = STALE_S) -> None:
    """Waits until no extension is being compiled; removes locks of ``stale_s`` seconds and more.

    Args:
        root: folder of compiled extensions; by default ``TORCH_EXTENSIONS_DIR``, or where PyTorch puts them.
        stale_s: age from which a lock is taken to be left over.
    """
    folder = root or Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    told: set[Path] = set()
    while locks := _locks(folder):
        for lock, age_s in locks.items():
            if age_s >= stale_s:
                with contextlib.suppress(OSError):
                    lock.unlink()
                    _tell(f"{lock}: removed; a compilation that was killed had left it")
            elif age_s >= _QUIET_S and lock not in told:
                told.add(lock)
                _tell(
                    f"{lock}: waiting for another process to compile this; if there is none, delete the file "
                    f"(in {stale_s - age_s:.0f} s this run does)"
                )
        time.sleep(_POLL_S)


def _locks(folder: Path) -> dict[Path, float]:
    """Every lock and its age in seconds. PyTorch's folders lie one or two levels down."""
    found = {}
    for pattern in ("*/lock", "*/*/lock"):
        for lock in folder.glob(pattern):
            with contextlib.suppress(OSError):  # gone in the meantime
                found[lock] = time.time() - lock.stat().st_mtime
    return found


def _tell(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
