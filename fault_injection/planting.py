"""Links and named pipes in a run folder where files or folders of the run belong."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from fault_injection.checks import FOREIGN
from fault_injection.kinds import MAY_STAY
from megatron_lpa.errors import EXIT_REFUSED
from megatron_lpa.run_folder import CHECKPOINTS, STEP

NOT_OURS = "not of this run\n"


def tree(folder: Path, without: Sequence[str] = ()) -> dict[str, str]:
    """Everything below a folder: what it is, and of a file the hash of what it holds.

    Args:
        folder: may be missing.
        without: first parts of paths that do not count.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        mode = path.lstat().st_mode
        if Path(name).parts[0] in without:
            continue
        if stat.S_ISDIR(mode):
            found[name] = "folder"
        elif stat.S_ISLNK(mode):
            found[name] = f"link to {os.readlink(path)}"
        elif stat.S_ISREG(mode):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "special"
    return found


class Planted:
    """Something in a run folder that leads out of it, or that must not be waited for.

    What had the name waits in ``aside`` and comes back with ``remove``, unless the run has put something of
    its own there.

    Args:
        run: the run folder.
        sort: ``symbolic``, ``folder``, ``hard``, ``dangling`` or ``pipe``.
        name: path inside ``run``.
        aside: a new folder, for what had the name and for what links lead to.
    """

    def __init__(self, run: Path, sort: str, name: str, aside: Path) -> None:
        self.path, self.name, self.sort = run / name, name, sort
        self._aside, self._outside = aside, aside / "outside"
        self._outside.mkdir(parents=True)
        target = self._outside / Path(name).name
        self._had = self.path.exists() or self.path.is_symlink()
        if sort == "folder":
            if self.path.is_dir():
                shutil.copytree(self.path, target)
            else:
                target.mkdir()
            (target / "other.txt").write_text(NOT_OURS)
        elif sort in ("symbolic", "hard"):
            if self.path.is_file():
                shutil.copyfile(self.path, target)
            else:
                target.write_text(NOT_OURS)
        if self._had:
            os.rename(self.path, self._aside / "original")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if sort == "pipe":
            os.mkfifo(self.path)
        elif sort == "hard":
            os.link(target, self.path)
        else:
            self.path.symlink_to(target)
        self._told = self.path.lstat()
        self._run, self._run_before = run, tree(run)
        self._before = tree(self._outside)

    def changed_outside(self) -> list[str]:
        """Names outside the run folder at which there is not what there was."""
        return _changed(self._before, tree(self._outside))

    def of_refused_start(
        self, codes: Sequence[int], errors: Sequence[str], seconds: float, limit_s: float
    ) -> list[str]:
        """Violations of a start that did not train. See ``refusal`` for the arguments."""
        found = refusal(codes, errors, seconds, limit_s) + of_planted(errors, self.name)
        if self.name.startswith(f"{CHECKPOINTS}/{STEP}"):
            found.append(f"no step was trained for {self.name}, where an older checkpoint was due")
        elif changed := _changed(self._run_before, tree(self._run)):
            found.append(f"refused, and the run folder has changed: {', '.join(changed)}")
        return found

    def of_start(self) -> list[str]:
        """Violations of a start that trained, and so has written every name that each start writes."""
        if f"{self.sort} {self.name}" in MAY_STAY or not self._is_there():
            return []
        return [f"not refused, and {self.name} is still what was planted ({self.sort})"]

    def _is_there(self) -> bool:
        if not os.path.lexists(self.path):
            return False
        found = self.path.lstat()
        # A file system gives the number of what is gone to the next file.
        return os.path.samestat(found, self._told) and stat.S_IFMT(found.st_mode) == stat.S_IFMT(
            self._told.st_mode
        )

    def remove(self) -> None:
        """Take it away where it still is, and bring back what had the name."""
        if os.path.lexists(self.path):
            if not self._is_there():
                shutil.rmtree(self._aside)
                return  # the run's own
            self.path.unlink()
        if self._had and self.path.parent.is_dir():  # and not a checkpoint that has been set aside since
            os.rename(self._aside / "original", self.path)
        shutil.rmtree(self._aside)


def _changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def refusal(codes: Sequence[int], errors: Sequence[str], seconds: float, limit_s: float) -> list[str]:
    """Violations of how a start was refused.

    Args:
        codes: exit codes, by rank.
        errors: what each rank wrote to stderr.
        seconds: that it took.
        limit_s: that it may take.
    """
    found = []
    if set(codes) != {EXIT_REFUSED}:
        found.append(f"exit codes {' '.join(map(str, codes))} where {EXIT_REFUSED} was due")
    if any(FOREIGN.search(text) for text in errors):
        found.append("refused with a traceback or a crash")
    if seconds > limit_s:
        found.append(f"it took {seconds:.0f} s to be refused")
    return found


def error_lines(errors: Sequence[str]) -> list[str]:
    """Lines of errors of all ranks."""
    return [line for text in errors for line in text.splitlines() if line.startswith("error:")]


def of_planted(errors: Sequence[str], name: str) -> list[str]:
    """Violations of what is said when a start is refused for a link or a pipe: one line, which names it.

    Before they have met, ranks say the same each with its own name in front.
    """
    lines = error_lines(errors)
    own_name = re.compile(r"^error: rank \d+ \([^)]*\): ")
    plain = [line for line in lines if not own_name.search(line)]
    texts = {own_name.sub("error: ", line) for line in lines}
    if len(plain) != 1 or len(texts) != 1:
        return [f"{len(lines)} lines of errors where one was due"]
    return [] if name in lines[0] else [f"the line of the error does not name {name}: {lines[0][:200]}"]


def of_mismatch(errors: Sequence[str], rank: int, key: str) -> list[str]:
    """Violations of what is said when one rank was given another option: a line that names both."""
    lines = error_lines(errors)
    of_rank = re.compile(rf"\brank {rank}\b|\branks [\d, and]*\b{rank}\b")
    if any(of_rank.search(line) and key in line for line in lines):
        return []
    return [f"no line of an error names rank {rank} and {key}: {' | '.join(lines)[:300]}"]
