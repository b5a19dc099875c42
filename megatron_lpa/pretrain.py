"""The entry point: ``deepspeed --module megatron_lpa.pretrain --preset tiny/lpa --data.prefix ...``.

Also ``megatron-lpa pretrain`` for one process, and ``torchrun -m`` for several.

Exit codes: 0 complete, 1 an error that may be gone at the next attempt, 75 a hang that the watchdog ended, 78
an error that stays until somebody changes something, 128 + n stopped by signal n (``errors.py``).
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from megatron_lpa.command_line import log_to_stderr, outlive_full_disks, outlive_readers, run_tool
from megatron_lpa.config import TrainConfig, fitted_to_world, load_config, validate_config
from megatron_lpa.engine.ds_config import check_zero_file
from megatron_lpa.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REFUSED, RankError, UserError
from megatron_lpa.parallel.launcher import tell_launcher
from megatron_lpa.parallel.place import place_from_environment
from megatron_lpa.train.stopping import StopRequest
from megatron_lpa.train.watchdog import Watchdog

logger = logging.getLogger("megatron_lpa.pretrain")  # not __name__: it is run with -m

AGAIN = "the same command would end like this again; change what the message names first"

AFTER_OTHERS_S = 0.3
"""Launchers end all processes when the first has ended: by then, one that tells why should have done so."""

ALONE_S = 2.0
"""A process that is still here so long after an error has it alone. Before processes have met, nothing else
tells."""


def main(argv: Sequence[str]) -> int:
    """Train as the command line says; the process's exit code."""
    log_to_stderr()
    # Where a rank is lost, PyTorch's store writes a page of C++ frames before our line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    stop = StopRequest()  # first, so that a launcher that ends during the start is missed
    watchdog = Watchdog(_number("RANK", 0))
    watchdog.start(TrainConfig.start_timeout_s)  # until the config says how long
    try:
        watchdog.enter("reading its configuration")
        config = load_config(argv)
        world_size = place_from_environment().world_size
        config, notes = fitted_to_world(config, world_size)
        outlive_full_disks()
        for warning in notes + validate_config(config, world_size):
            if os.environ.get("RANK", "0") == "0":
                logger.warning(warning)
        check_zero_file(config, world_size)
        watchdog.limit(config.train.start_timeout_s, "train.start_timeout_s")
        watchdog.enter("loading libraries")
        # Seconds of imports, only once the config is known to be good.
        from megatron_lpa.train.start import run_training

        signum = run_training(config, watchdog, stop)
    except UserError as error:
        watchdog.finish()
        _tell(error)
        return error.exit_code
    except KeyboardInterrupt:
        if not _number("LOCAL_RANK", 0):
            print("stopped by SIGINT before training began; the same command starts again", flush=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        watchdog.finish()
        traceback.print_exc()
        tell_launcher(f"{type(error).__name__}: {error}")
        return EXIT_FAILED
    finally:
        watchdog.stop()
    return 128 + signum if signum else 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 10 else default


def _tell(error: UserError) -> None:
    """Once per machine: whatever all ranks know, or one machine alone lacks. And whatever one rank alone has
    found."""
    message = str(error)
    rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
    if not isinstance(error, RankError) and local_rank:
        # Launchers end all processes when the first has ended. Who is still here then is alone with its
        # error.
        time.sleep(AFTER_OTHERS_S if error.known_to_all else ALONE_S)
        if error.known_to_all:
            return
    if rank and not isinstance(error, RankError) and not error.known_to_all:
        message = f"rank {rank} ({socket.gethostname()}): {message}"
    logger.error(message)
    tell_launcher(f"error: {message}")
    if error.exit_code == EXIT_REFUSED:
        # For slurm/common.sh as well: srun ends the other processes, and then gives theirs instead of this
        # code.
        logger.info(f"exit code {EXIT_REFUSED}: {AGAIN}")


def leave(code: int) -> NoReturn:
    """End this process now.

    The interpreter's own clean-up destroys process groups in no particular order, and gloo's threads have
    been seen to abort a process there that had finished its run. After an error on this rank alone, leaving
    the groups in order could wait for the others. Nothing is left to clean up.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or on a disk that is full
            stream.flush()
    os._exit(code)


def run(argv: Sequence[str]) -> NoReturn:
    """All of a training process, which it ends: faults say where, and a lost terminal is no reason to
    stop."""
    faulthandler.enable()  # a crash in native code, or SIGBUS of a mapped file, says at least where
    outlive_readers()
    leave(main(argv))


if __name__ == "__main__":
    sys.exit(run_tool(lambda: run(sys.argv[1:])))
