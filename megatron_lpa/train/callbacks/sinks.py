"""Sinks of records: the metrics file, the console, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_lpa.config.redaction import Redaction
from megatron_lpa.errors import UserError
from megatron_lpa.train.callbacks.base import Sink
from megatron_lpa.train.state import Record, Run

METRICS = "metrics.jsonl"


def drop_records_after(path: Path, step: int, keep_events: bool = False) -> None:
    """Remove records that a run is going to repeat (later steps, the final test), and a torn last line.

    Args:
        path: the metrics file.
        step: the run goes on after this one.
        keep_events: keep what happened; a run that resumes is going to have other checkpoints.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict):
            continue
        earlier = record.get("step", 0) <= step and record.get("kind") != "test"
        if earlier or (keep_events and record.get("kind") == "event"):
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)


MOST_WAITING = 10_000
"""Records that wait in memory for a disk that is full: a few megabytes."""


class MetricsFile(Sink):
    """``metrics.jsonl`` in the run folder: the record of a run, one JSON object per line.

    Records that cannot be written wait in memory, and are tried again with each one that follows: a disk that is full
    for a while ends no run and leaves no gap.
    """

    required = True

    def __init__(self) -> None:
        self._path = Path(METRICS)
        self._file: BinaryIO | None = None
        self._whole_bytes = 0
        self._waiting: list[Record] = []
        self._rewind_to: int | None = None

    def open(self, run: Run) -> None:
        """Continue the file from the step the run resumes at."""
        self._path = run.folder / METRICS
        drop_records_after(self._path, run.progress.step)
        self._open_to_append()

    def _open_to_append(self) -> None:
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self._whole_bytes = os.fstat(self._file.fileno()).st_size

    def write(self, record: Record) -> None:
        """Append one line, after those that wait.

        Raises:
            OSError: as ``flush``, once too many wait.
        """
        self._waiting.append(record)
        try:
            self.flush()
        except OSError as error:
            if len(self._waiting) > MOST_WAITING:
                raise
            if len(self._waiting) == 1:
                self._warn(error)

    def _warn(self, error: OSError) -> None:
        print(
            f"warning: metrics cannot be written, and wait in memory: {self._path}: {error}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def flush(self) -> None:
        """Append what waits.

        Raises:
            OSError: a line cannot be written; no part of it stays in the file.
        """
        if self._rewind_to is not None:
            if self._file is not None:
                self._file.close()
            drop_records_after(self._path, self._rewind_to, keep_events=True)
            self._open_to_append()
            self._rewind_to = None
        assert self._file is not None
        while self._waiting:
            line = (json.dumps(self._waiting[0]) + "\n").encode()
            try:
                written = self._file.write(line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):  # a device cannot be cut
                    self._file.truncate(self._whole_bytes)
                raise
            self._whole_bytes += len(line)
            del self._waiting[0]

    def rewind(self, run: Run) -> None:
        """Drop later steps; events stay. Where the file cannot be written anew, that waits like records."""
        step = run.progress.step
        self._waiting = [r for r in self._waiting if r["kind"] == "event" or r["step"] <= step]
        self._rewind_to = step if self._rewind_to is None else min(step, self._rewind_to)
        try:
            self.flush()
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Close the file; what waits is tried a last time."""
        if self._file is not None:
            try:
                self.flush()
            finally:
                self._file.close()


class Console(Sink):
    """Readable lines on stdout, and a progress bar on a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._steps = 0

    def open(self, run: Run) -> None:
        """Start the progress bar where one is wanted."""
        self._steps = run.steps
        wanted = run.config.logging.progress_bar
        if wanted == "on" or (wanted == "auto" and sys.stderr.isatty()):
            from tqdm import tqdm

            self._bar = tqdm(total=run.steps, initial=run.progress.step, unit="step", dynamic_ncols=True)

    def write(self, record: Record) -> None:
        """One line per record."""
        self._say(describe(record, self._steps))
        if self._bar is not None and record["kind"] == "train":
            self._bar.update(record["step"] - self._bar.n)
            self._bar.set_postfix(loss=_number(record["loss"], ".3f"))

    def close(self) -> None:
        """Finish the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        else:
            print(line, flush=True)


def describe(record: Record, steps: int) -> str:
    """A record as one readable line."""
    step = f"step {record['step']:>{len(str(steps))}}/{steps}"
    if record["kind"] == "train":
        mfu = "" if record["mfu"] is None else f" | mfu {100 * record['mfu']:.1f} %"
        return (
            f"{step} | loss {_number(record['loss'], '.4f')} | lr {record['lr']:.2e}"
            f" | grad norm {_number(record['grad_norm'], '.3f')}"
            f" | {record['tokens_per_second']:,.0f} tokens/s | {record['step_ms']:.0f} ms/step{mfu}"
        )
    if record["kind"] in ("valid", "test"):
        return (
            f"{step} | {record['kind']} loss {record['loss']:.4f} | perplexity {record['perplexity']:.2f}"
            f" | {record['tokens_evaluated']:,} tokens"
        )
    return f"{step} | {record['message']}"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


class TensorBoard(Sink):
    """Event files in ``<run folder>/tensorboard``."""

    def __init__(self) -> None:
        self._writer: Any = None

    def open(self, run: Run) -> None:
        """Open the writer; earlier events after the resumed step are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.progress.step + 1)

    def write(self, record: Record) -> None:
        """Every number under ``<kind>/<name>``."""
        for name, value in numbers(record).items():
            self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


class WandB(Sink):
    """Weights & Biases, online or offline; the run's id is kept in the run folder for resuming.

    W&B gets metrics and the configuration without known secrets. What it would collect by itself it does not: the
    command, every variable of SLURM (with the job's comment), the repository's address. The snapshot has what matters.
    """

    def __init__(self, mode: Literal["offline", "online"]) -> None:
        self._mode = mode
        self._run: Any = None

    def open(self, run: Run) -> None:
        """Start or continue the W&B run.

        Raises:
            UserError: the package is not installed.
        """
        try:
            import wandb
        except ImportError:
            raise UserError(
                "logging.wandb needs the package wandb: pip install 'megatron_lpa[wandb]', or set logging.wandb=off"
            ) from None
        id_file = run.folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(os.urandom(4).hex())
        self._run = wandb.init(
            project=run.config.logging.wandb_project,
            name=run.folder.name,
            id=id_file.read_text().strip(),
            resume="allow",
            mode=self._mode,
            dir=str(run.folder),
            config=Redaction(os.environ).tree(dataclasses.asdict(run.config)),
            settings=wandb.Settings(
                x_disable_machine_info=True, x_disable_meta=True, disable_git=True, disable_code=True
            ),
        )

    def write(self, record: Record) -> None:
        """Every number under ``<kind>/<name>``."""
        values = {f"{record['kind']}/{name}": value for name, value in numbers(record).items()}
        if values:
            self._run.log(values, step=record["step"])

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            self._run.finish()


def numbers(record: Record) -> dict[str, float]:
    """The numeric fields of a record, without its position."""
    return {
        name: value
        for name, value in record.items()
        if isinstance(value, (int, float)) and name not in ("step", "time")
    }
