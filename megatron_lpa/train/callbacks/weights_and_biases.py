"""Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import socket
from pathlib import Path
from typing import Any, Literal

from megatron_lpa.config.redaction import Redaction
from megatron_lpa.errors import UserError
from megatron_lpa.files import read_text, write_whole
from megatron_lpa.records import Record
from megatron_lpa.run_folder import SUPERSEDED, WANDB, WANDB_ID
from megatron_lpa.train.callbacks.callback import Sink
from megatron_lpa.train.callbacks.views import any_record, history, numbers
from megatron_lpa.train.state import Run

logger = logging.getLogger(__name__)

NO_WANDB = (
    "logging.wandb needs the package wandb: pip install 'megatron_lpa[wandb]', or set logging.wandb=off"
)

TAG = "superseded"
"""Of a W&B run whose history another one tells now."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which W&B run belongs to a run folder; the file ``wandb_id``.

    Args:
        id: of the W&B run.
        path: of the run folder when this was written; empty where an earlier version wrote it.
        inode: of the run folder.
        host: that wrote this.
        complete: whether the W&B run has all records that came before it was begun.
    """

    id: str
    path: str = ""
    inode: int = 0
    host: str = ""
    complete: bool = True


def new_identity(folder: Path) -> Identity:
    """A W&B run that nobody has begun."""
    return owned(Identity(os.urandom(4).hex(), complete=False), folder)


def owned(identity: Identity, folder: Path) -> Identity:
    """It, as that of this folder."""
    return dataclasses.replace(
        identity, path=str(folder.resolve()), inode=os.stat(folder).st_ino, host=socket.gethostname()
    )


def read_identity(folder: Path) -> Identity | None:
    """What a run folder says; None where it says nothing that can be used.

    Raises:
        TryAgain: the disk does not give it.
    """
    try:
        text = read_text(folder / WANDB_ID).strip()
    except FileNotFoundError:
        return None
    found: Any = {"id": text}
    if text.startswith("{"):
        with contextlib.suppress(ValueError):
            found = json.loads(text)
    try:
        identity = Identity(**found)
    except TypeError:
        return None
    kinds = {"id": str, "path": str, "inode": int, "host": str, "complete": bool}
    sound = all(isinstance(getattr(identity, name), kind) for name, kind in kinds.items())
    return identity if sound and re.fullmatch(r"[\w-]{1,64}", identity.id) else None


def is_copy(identity: Identity, folder: Path) -> bool:
    """Whether a folder is a copy of the one that a W&B run belongs to. One that was moved is none.

    The folder at its former place tells, if it still is one of a W&B run. Where none is there any more, the
    folder was moved: within a file system it keeps its inode, and else it was moved on this machine.
    """
    own = folder.resolve()
    if identity.path in ("", str(own)):
        return False
    there, other = Path(identity.path), None
    try:
        other = read_identity(there)
        if other is not None and other.id == identity.id:
            return not there.samefile(own)
    except (OSError, UserError):  # it may not be looked at
        pass
    return identity.inode != os.stat(folder).st_ino and (
        other is not None or identity.host != socket.gethostname()
    )


class WandB(Sink):
    """Weights & Biases, online or offline; which W&B run belongs to the run folder is kept in it, for
    resuming.

    A W&B run takes nothing back. So where steps come again, and in a copy of a run folder, another W&B run is
    begun, and gets the records so far as well. Offline, what the one before has in the run folder is put
    where ``wandb sync`` does not find it; online it gets a tag.

    W&B gets metrics and the configuration without known secrets. What it would collect by itself it does not:
    the command, every variable of SLURM (with the job's comment), the repository's address. The snapshot has
    what matters.
    """

    def __init__(self, mode: Literal["offline", "online"]) -> None:
        self._mode = mode
        self._run: Any = None
        self._identity: Identity | None = None
        self._former: str | None = None

    def look(self, run: Run) -> None:
        """Choose the W&B run, before anything goes that another start would have to know of."""
        folder = run.folder
        known, reason = read_identity(folder), ""
        if known is None:
            self._identity = new_identity(folder)
        elif is_copy(known, folder):
            reason = f"this folder is a copy of {known.path}"
        elif not known.complete:
            reason = "the records so far are not all in the one before"
        elif any_record(run, lambda record: record["kind"] != "event" and record["step"] > run.progress.step):
            reason = f"steps after {run.progress.step} come again"
        else:
            self._identity = owned(known, folder)
        if known is not None and reason:
            self._identity = new_identity(folder)
            self._tell(known.id, reason)
            # Of a copy it goes on in the original.
            self._former = None if reason.startswith("this folder") else known.id
            self._set_aside(folder, known.id)
        self._keep(folder)

    def _tell(self, former: str, reason: str) -> None:
        assert self._identity is not None
        words = f"a new run at W&B, {self._identity.id} instead of {former}: {reason}"
        logger.info(f"note: {words}")

    def _keep(self, folder: Path) -> None:
        assert self._identity is not None
        write_whole(folder / WANDB_ID, json.dumps(dataclasses.asdict(self._identity)) + "\n")

    def open(self, run: Run) -> None:
        """Start or continue the W&B run.

        Raises:
            UserError: the package is not installed.
        """
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UserError(NO_WANDB) from None
        if self._identity is None:  # nobody has looked
            self.look(run)
        assert self._identity is not None
        if self._former is not None and self._mode == "online":
            self._run = self._started(run, self._former)
            self._finish_superseded()
        self._begin(run)

    def _begin(self, run: Run) -> None:
        """Start or continue it; a new one gets the records so far."""
        assert self._identity is not None
        self._run = self._started(run, self._identity.id)
        if self._identity.complete:
            return
        for record in history(run):
            self.write(record)
        self._identity = dataclasses.replace(self._identity, complete=True)
        self._keep(run.folder)

    def _started(self, run: Run, wandb_id: str) -> Any:
        import wandb

        return wandb.init(
            project=run.config.logging.wandb_project,
            name=run.folder.name,
            id=wandb_id,
            resume="allow",
            mode=self._mode,
            dir=str(run.folder),
            config=Redaction(os.environ).tree(dataclasses.asdict(run.config)),
            settings=wandb.Settings(
                x_disable_machine_info=True,
                x_disable_meta=True,
                disable_git=True,
                disable_code=True,
                console="off",
                x_save_requirements=False,
            ),
        )

    def _finish_superseded(self) -> None:
        try:
            self._run.tags = (*(self._run.tags or ()), TAG)
            self._run.finish()
        except Exception as error:  # somebody may have deleted it at W&B
            logger.warning(f"W&B: the run before could not be tagged ({error})")

    def _set_aside(self, folder: Path, wandb_id: str) -> None:
        """Put offline folders of a W&B run where ``wandb sync`` finds only those that it is given by name."""
        # The second one of a second gets a number.
        names = (f"offline-run-*-{wandb_id}", f"offline-run-*-{wandb_id}-*")
        for path in [path for name in names for path in (folder / WANDB).glob(name)]:
            (folder / SUPERSEDED).mkdir(exist_ok=True)
            path.rename(folder / SUPERSEDED / path.name)

    def write(self, record: Record) -> None:
        """Every number under ``<kind>/<name>``."""
        values = {f"{record['kind']}/{name}": value for name, value in numbers(record).items()}
        if values:
            self._run.log(values, step=record["step"])

    def rewind(self, run: Run) -> None:
        """Begin another W&B run, which never had the steps that come again."""
        assert self._identity is not None
        former = self._identity.id
        self._identity = new_identity(run.folder)
        self._tell(former, f"the run went back to step {run.progress.step}")
        self._keep(run.folder)
        self._finish_superseded()
        self._set_aside(run.folder, former)
        self._begin(run)

    def close(self) -> None:
        """Finish the W&B run."""
        if self._run is not None:
            self._run.finish()
