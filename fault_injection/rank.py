"""One process of a run, with places at which it tells where it is, stands still, or sees what is not there.

Nothing of the run itself is replaced: functions are wrapped, and the wrapped ones do the work. The process
and the driver are joined by a socket: messages go one way, the word to go on comes back.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from fault_injection.interposed import Disk
from megatron_lpa import run_folder

STEP, LOAD, BAD = "step", "load", "bad"

PAUSES_FASTER = 10
"""By so much shorter are the pauses before another attempt to read; their number is that of the run."""


class Places:
    """Wraps what a run does, and stands still where it is told to.

    Args:
        spec: ``holds``: lists of an id, a place and the first step at which to stand still there;
            ``nan``: global batches in which the gradient is not a number;
            ``unreadable``: the step from which on data cannot be read, and how often (0: always);
            ``clock``: the step from which on, and hours by which ``time.time`` is off;
            ``full``: steps from and to which nothing can be written into checkpoints;
            ``errors``: as ``interposed.Disk``.
        link: to the driver.
    """

    def __init__(self, spec: dict[str, Any], link: socket.socket) -> None:
        self._spec, self._link = spec, link
        self._holds: list[list[Any]] = spec.get("holds", [])
        self._unread = 0
        self._disk = Disk(
            spec.get("errors", []), spec.get("full", (0, -1)), self.tell, self.reach, self._holds_at
        )

    def tell(self, **event: Any) -> None:
        """One message to the driver."""
        self._link.send(json.dumps(event).encode())

    def reach(self, place: str, step: int) -> None:
        """Stand still here, if told to, until the driver says go or ends the process."""
        for hold in self._due(place, step):
            self._holds.remove(hold)
            self.tell(event="hold", id=hold[0], place=place, step=step)
            self._link.recv(1)

    def _due(self, place: str, step: int) -> list[list[Any]]:
        return [hold for hold in self._holds if hold[1] == place and step >= hold[2]]

    def _holds_at(self, place: str, step: int) -> bool:
        return bool(self._due(place, step))

    def wrap(self) -> None:
        """Put all wrappers into place."""
        self._wrap_steps()
        self._wrap_saves()
        self._wrap_load()
        self._disk.wrap()
        _shorten_pauses()

    def _wrap_steps(self) -> None:
        from megatron_lpa.engine.stepping import Engine
        from megatron_lpa.train import loop

        read, load, train_step = loop._read_batches, loop.load_batch, Engine.train_step
        at_step = 0

        def read_batches(run: Any) -> Any:
            nonlocal at_step
            at_step = run.progress.step
            self.tell(event="step", step=at_step)
            self._set_clock(at_step)
            self.reach(STEP, at_step)
            return read(run)

        def load_batch(samples: Any, *arguments: Any) -> Any:
            since, times = self._spec.get("unreadable", (1 << 60, 0))
            if at_step >= since and (times == 0 or self._unread < times):
                self._unread += 1
                self.tell(event="unreadable", step=at_step)
                with self._disk.cut_short(r"\.bin$"):
                    return load(samples, *arguments)
            return load(samples, *arguments)

        def with_nan(engine: Any, batches: Any, first_samples: Any, lr: float) -> Any:
            batch = first_samples[0] // engine.config.train.global_batch_size
            if batch not in self._spec.get("nan", ()):
                return train_step(engine, batches, first_samples, lr)

            def spoil(module: Any, inputs: Any, output: Any) -> None:
                output.register_hook(lambda gradient: gradient * float("nan"))

            self.tell(event="nan", step=at_step)
            hook = engine.module.final_norm.register_forward_hook(spoil)
            try:
                return train_step(engine, batches, first_samples, lr)
            finally:
                hook.remove()
                self.reach(BAD, batch)

        _put(loop, _read_batches=read_batches, load_batch=load_batch)
        _put(Engine, train_step=with_nan)

    def _set_clock(self, step: int) -> None:
        since, hours = self._spec.get("clock", (1 << 60, 0.0))
        if step >= since and hours:
            real = time.time
            time.time = lambda: real() + 3600 * hours
            self._spec["clock"] = (1 << 60, 0.0)
            self.tell(event="clock", step=step)

    def _wrap_load(self) -> None:
        from megatron_lpa.checkpoint import resume

        restore = resume._restore

        def held_restore(*arguments: Any) -> None:
            self.reach(LOAD, 0)
            restore(*arguments)

        _put(resume, _restore=held_restore)

    def _wrap_saves(self) -> None:
        rename = os.rename

        def held_rename(source: Any, target: Any, **options: Any) -> None:
            name = Path(source).name
            publishing = name.startswith(f".{run_folder.STEP}") and name.endswith(".partial")
            if publishing:
                self.reach("before-rename", _step_in(name))
            rename(source, target, **options)
            if publishing:
                self.reach("after-rename", _step_in(name))
            if Path(target).name.endswith(".removed"):
                self.reach("removing", _step_in(name))

        _put(os, rename=held_rename)


def _shorten_pauses() -> None:
    """Attempts to read come sooner one after another, so that faults take less time."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron_lpa.") and hasattr(module, "PAUSES_S"):
            pauses_s: tuple[float, ...] = module.PAUSES_S
            _put(module, PAUSES_S=tuple(pause_s / PAUSES_FASTER for pause_s in pauses_s))


def _put(owner: Any, **functions: Any) -> None:
    for name, function in functions.items():
        setattr(owner, name, function)


def _step_in(path: str) -> int:
    return int(path.rpartition(run_folder.STEP)[2][:8])


def run(spec: dict[str, Any], link: socket.socket) -> NoReturn:
    """Be one process of a run, from the command line in ``spec`` to the exit code."""
    from megatron_lpa.pretrain import leave, main

    faulthandler.enable()  # as the entry point does
    Places(spec, link).wrap()
    leave(main(spec["arguments"]))


if __name__ == "__main__":
    run(json.loads(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
