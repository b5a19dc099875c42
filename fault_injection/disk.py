"""A disk that can be filled, and damage to what lies on disks."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from pathlib import Path

from fault_injection.fault_plan import INTERVAL
from fault_injection.kinds import MALFORMED
from fault_injection.malformed import malform
from megatron_lpa.run_folder import MANIFEST, STEP, checkpoint_name, step_of


def keep_mounts_to_ourselves() -> None:
    """Mounts are seen by this process and its children alone, and go with it, however it ends; where that is
    allowed."""
    new_mounts = 0x00020000  # CLONE_NEWNS of sched.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "unshare") and libc.unshare(new_mounts) == 0:
        subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)


class SmallDisk:
    """A file system of 48 MB in memory, mounted on a folder, where this user may mount one.

    Args:
        folder: to mount it on.
    """

    MB = 48

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._ballast = folder, folder / "ballast"
        words = ["mount", "-t", "tmpfs", "-o", f"size={self.MB}m", "tmpfs", str(folder)]
        try:
            self.mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
        except OSError:
            self.mounted = False

    def fill(self, free_bytes: int) -> None:
        """Leave no more than ``free_bytes``."""
        with open(self._ballast, "ab") as file:
            try:
                while (more := shutil.disk_usage(self._folder).free - free_bytes) > 0:
                    file.write(b"\0" * min(more, 1 << 20))
                    file.flush()
            except OSError:  # to the last byte
                pass

    def empty(self) -> None:
        """Free what ``fill`` took."""
        self._ballast.unlink(missing_ok=True)

    def unmount(self) -> None:
        """Give the folder back; what was on it is gone."""
        if self.mounted:
            subprocess.run(["umount", str(self._folder)], capture_output=True, check=False)
            self.mounted = False


def damage(checkpoints: Path, newest: Path, kind: str, seed: int) -> Path | None:
    """Damage the newest checkpoint, or put something beside it that is none.

    Returns:
        The folder that must be skipped with a word; None where nothing is left to speak of.
    """
    draw = random.Random(seed)
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.name != MANIFEST)
    victim, manifest = draw.choice(files), newest / MANIFEST
    if kind == "truncated":
        os.truncate(victim, draw.randrange(1, victim.stat().st_size))
    elif kind == "bit-flipped":
        _flip(victim, draw)
    elif kind == "missing":
        victim.unlink()
    elif kind == "empty":
        os.truncate(victim, 0)
    elif kind == "manifest-flipped":
        _flip(manifest, draw)
    elif kind == "manifest-empty":
        os.truncate(manifest, 0)
    elif kind == "manifest-missing":
        manifest.unlink()
    elif kind == "half-copied":
        # After the last of all: one that an earlier fault damaged may lie behind the newest sound one.
        last = max(step_of(folder) for folder in checkpoints.glob(f"{STEP}*"))
        copy = checkpoints / checkpoint_name(last + INTERVAL)
        shutil.copytree(newest, copy)
        (copy / victim.relative_to(newest)).unlink()
        return copy
    elif kind == "deleted":
        shutil.rmtree(newest)
        return None
    elif kind in MALFORMED:
        malform(newest, kind)
    else:
        raise ValueError(kind)
    return newest


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
