"""What started this process, what to change there, and how to tell it why a process ended."""

from __future__ import annotations

import contextlib
import json
import os
import time

from megatron_lpa.files import write_whole

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where torchrun reads what a process ended with, for the summary that it closes with."""

_ANOTHER_PORT = {
    "deepspeed": "give deepspeed another --master_port",
    "torchrun": "give torchrun another --master-port, or another port in --rdzv-endpoint",
    "srun": (
        "slurm/*.sh take another port at their next start; a script of your own has to export another "
        "MASTER_PORT"
    ),
    "": "give the launcher another --master_port, or set another MASTER_PORT",
}


def launcher() -> str:
    """``torchrun``, ``deepspeed``, ``srun``, or an empty text for another one.

    The first two may have been started by ``srun`` themselves.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "CROSS_SIZE" in os.environ and "LOCAL_SIZE" in os.environ:
        return "deepspeed"
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_PROCID") == os.environ.get("RANK"):
        return "srun"
    return ""


def another_port() -> str:
    """How to meet at another port, in words that follow "if another run uses this port,"."""
    return _ANOTHER_PORT[launcher()]


def tell_launcher(message: str) -> None:
    """Let torchrun close with ``message``; it prints a traceback of its own, and else says where to read
    about tracebacks.

    Nothing happens under another launcher.
    """
    path = os.environ.get(ERROR_FILE)
    if not path:
        return
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError):
        write_whole(path, json.dumps(content))
