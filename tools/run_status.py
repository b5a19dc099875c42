#!/usr/bin/env python3
"""Whether a run is complete, from what is in its folder.

    python tools/run_status.py runs/tiny-lpa

A launcher's exit code does not tell: that of ``deepspeed`` is 0 too when what it started was killed. Here a run is
complete when the checkpoint of its last step is, and the final test is on record where ``data.test_prefix`` asks for
one. Of a checkpoint's files the sizes are compared with its manifest, with ``--verify`` the contents too: some GB per
second. Ends with 0 then, with 1 when the same command would go on with it, and with 78 when that cannot be told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lpa.engine.manifest import (
    MANIFEST,
    DamagedCheckpoint,
    complete_checkpoints,
    read_manifest,
    verify_files,
)
from megatron_lpa.errors import EXIT_FAILED, UserError
from megatron_lpa.evaluate.metrics_file import METRICS, read_metrics, records_of
from megatron_lpa.evaluate.trained import read_config
from megatron_lpa.files import exists
from megatron_lpa.train.schedule import total_steps


def status(folder: Path, verify: bool = False) -> tuple[bool, str]:
    """Whether a run is complete, and what there is of it, in words.

    Args:
        folder: the run's.
        verify: compare the contents of a checkpoint's files with their hashes, not their sizes alone.

    Raises:
        UserError: not a run folder.
        TryAgain: the disk does not give a file.
    """
    config = read_config(folder)
    damaged = []
    for checkpoint in reversed(complete_checkpoints(folder / "checkpoints")):
        try:
            manifest = read_manifest(checkpoint)
            if verify:
                verify_files(checkpoint, manifest, manifest["files"])
        except DamagedCheckpoint:
            damaged.append(checkpoint.name)
            continue
        step = manifest["progress"].step
        try:
            steps = total_steps(config.train, config.model, int(manifest["order"]["samples_per_epoch"]))
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{checkpoint / MANIFEST}: it does not say how many samples an epoch has"
            ) from error
        break
    else:
        return False, "incomplete: no whole checkpoint yet" + _damage(damaged)
    compared = "contents compared" if verify else "sizes compared"
    words = f"{step:,} of {steps:,} steps are in {checkpoint} ({compared})" + _damage(damaged)
    if step < steps:
        return False, f"incomplete: {words}"
    if config.data.test_prefix is not None and not _is_tested(folder, step):
        return False, f"incomplete: {words}, but the final test is not on record"
    return True, f"complete: {words}"


def _damage(names: list[str]) -> str:
    return f" ({', '.join(names)}: damaged)" if names else ""


def _is_tested(folder: Path, step: int) -> bool:
    if not exists(folder / METRICS):
        return False
    return any(record["step"] == step for record in records_of(read_metrics(folder), "test"))


def main(argv: Sequence[str]) -> int:
    """0 for a complete run, 1 for one that is not, 78 with a message for what the user can mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="FOLDER", help="run folder")
    parser.add_argument(
        "--verify", action="store_true", help="read all files of the checkpoint, and compare their hashes"
    )
    given = parser.parse_args(argv)
    try:
        complete, words = status(Path(given.run), given.verify)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(words)
    return 0 if complete else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
