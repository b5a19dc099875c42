"""Whether a run is complete, from what is in its folder.

    python tools/run_status.py runs/tiny-lpa
    python tools/run_status.py 'runs/sweep-*'

A launcher's exit code does not tell: that of ``deepspeed`` is 0 too when what it started was killed. Here a
run is complete when the checkpoint of its last step is, and the last validation and the final test, where it
has them, are on record. Of a checkpoint's files the sizes are compared with its manifest, with ``--verify``
the contents too: some GB per second. Ends with 0 then, with 1 when the same command would go on with it, and
with 78 when it would not, as no whole checkpoint is left, or when that cannot be told. Of several runs the
worst code counts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from megatron_lpa.checkpoint.manifest import (
    DamagedCheckpoint,
    checkpoint_folders,
    complete_checkpoints,
    paths_in,
    read_manifest,
    verify_files,
)
from megatron_lpa.checkpoint.store import REPLACED, damaged_folders
from megatron_lpa.command_line import command, run_folders, tool_parser
from megatron_lpa.errors import EXIT_FAILED, UserError
from megatron_lpa.evaluate.trained import read_config
from megatron_lpa.files import exists
from megatron_lpa.records import NoRecord, NoStep, read_lines
from megatron_lpa.run_folder import CHECKPOINTS, MANIFEST, METRICS, shown
from megatron_lpa.train.schedule import total_steps

logger = logging.getLogger(__name__)


def status(folder: Path, verify: bool = False) -> tuple[bool, str]:
    """Whether a run is complete, and what there is of it, in words.

    Args:
        folder: the run's.
        verify: compare the contents of a checkpoint's files with their hashes, not their sizes alone.

    Raises:
        UserError: not a run folder, or one whose checkpoints are all damaged.
        TryAgain: the disk does not give a file.
    """
    config = read_config(folder)
    damaged = []
    for checkpoint in reversed(complete_checkpoints(folder / CHECKPOINTS)):
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
        _refuse_loss(folder / CHECKPOINTS)
        return False, "incomplete: no whole checkpoint yet"
    compared = "contents compared" if verify else "sizes compared"
    words = f"{step:,} of {steps:,} steps are in {checkpoint} ({compared})" + _damage(damaged)
    if step < steps:
        return False, f"incomplete: {words}"
    wanted = manifest.get("evaluates") or {
        "valid": config.data.valid_prefix is not None and config.train.eval_interval > 0,
        "test": config.data.test_prefix is not None,
    }
    recorded, note = _recorded(folder / METRICS, step)
    for kind, name in (("valid", "last validation"), ("test", "final test")):
        if wanted.get(kind) and kind not in recorded:
            return False, f"incomplete: {words}, but the {name} is not on record{note}"
    return True, f"complete: {words}{note}"


def _damage(names: list[str]) -> str:
    return f" ({', '.join(names)}: damaged)" if names else ""


def _refuse_loss(checkpoints: Path) -> None:
    """As a start does where no checkpoint is whole: only a run that never had one begins from nothing.

    Raises:
        UserError: there are or have been some.
    """
    if paths_in(checkpoints, REPLACED):
        return  # a start brings it back
    names = [path.name for path in [*checkpoint_folders(checkpoints), *damaged_folders(checkpoints)]]
    if names:
        raise UserError(
            f"{checkpoints}: no whole checkpoint is left ({', '.join(map(shown, names))}), and a start would "
            "be refused; bring one back from a copy, or start anew under another logging.name"
        )


def _recorded(path: Path, step: int) -> tuple[set[str], str]:
    """The kinds of records of a step, and a note of lines that are none: a start leaves them out."""
    if not exists(path):
        return set(), ""
    recorded: set[str] = set()
    damaged: list[int] = []
    try:
        for line in read_lines(path):
            if not line.ended:
                continue  # still being written
            try:
                record = line.record()
            except NoStep:
                continue
            except NoRecord:
                damaged.append(line.number)
                continue
            if record["step"] == step:
                recorded.add(record["kind"])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if not damaged:
        return recorded, ""
    more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
    return recorded, f" (note: {path}: line {damaged[0]}{more}: damaged)"


@command()
def main(argv: Sequence[str]) -> int:
    """0 for a complete run, 1 for one that is not, 78 with a message for what the user can mend."""
    parser = tool_parser(__doc__)
    parser.add_argument("run", nargs="+", metavar="FOLDER", help="run folders, or patterns in quotes")
    parser.add_argument(
        "--verify", action="store_true", help="read all files of the checkpoint, and compare their hashes"
    )
    given = parser.parse_args(argv)
    codes = []
    for folder in run_folders([given.run], "FOLDER"):
        try:
            complete, words = status(folder, given.verify)
        except UserError as error:
            logger.error(error)
            codes.append(error.exit_code)
            continue
        print(words, flush=True)
        codes.append(0 if complete else EXIT_FAILED)
    return max(codes)
