"""Train, and tell which files of the package each step and each checkpoint enter.

    python walk.py OUTPUT ARGUMENTS of megatron_lpa.pretrain

OUTPUT gets JSON: under ``steps`` a list of names for each optimizer step, of all that is entered from its
forward pass up to that of the next one: one iteration of the loop, callbacks included. Under ``saves`` one
for each checkpoint, from ``begin_save`` to the end of ``complete``, with the thread that writes it, without
what calls the two.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import megatron_lpa

PACKAGE = str(Path(megatron_lpa.__file__).parent) + "/"
SAVING = PACKAGE + "checkpoint/saving.py"


class Walk:
    """Takes the calls of all threads.

    Attributes:
        steps, saves: names of files, in the order of steps and of checkpoints.
    """

    def __init__(self) -> None:
        self.steps: list[set[str]] = []
        self.saves: list[set[str]] = []
        self._saving_in: set[int] = set()

    def see(self, frame: FrameType, event: str, _: Any) -> None:
        """As ``sys.setprofile`` wants it."""
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        if event not in ("call", "return") or not path.startswith(PACKAGE):
            return
        thread = threading.get_ident()
        boundary = path == SAVING and function in ("begin_save", "_write", "complete")
        if event == "return":
            # What is written at once is written inside begin_save.
            if boundary and (
                function != "_write" or threading.current_thread() is not threading.main_thread()
            ):
                self._saving_in.discard(thread)
            return
        if boundary:
            self._saving_in.add(thread)
        if boundary and function == "begin_save":
            self.saves.append(set())
        if function == "train_step" and path.startswith(PACKAGE + "engine/"):
            self.steps.append(set())
        name = path.removeprefix(PACKAGE)
        if thread in self._saving_in:
            self.saves[-1].add(name)
        if self.steps and (
            thread not in self._saving_in or threading.current_thread() is threading.main_thread()
        ):
            self.steps[-1].add(name)


def main(output: Path, arguments: list[str]) -> int:
    """Train under the profile; returns the exit code of training."""
    from megatron_lpa import pretrain

    walk = Walk()
    threading.setprofile(walk.see)
    sys.setprofile(walk.see)
    try:
        code = pretrain.main(arguments)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    output.write_text(
        json.dumps({key: [sorted(names) for names in getattr(walk, key)] for key in ("steps", "saves")})
    )
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
