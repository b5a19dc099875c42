"""One process of a run, with places at which it tells where it is, stands still, or sees what is not there.

Nothing of the run itself is replaced: functions are wrapped, and the wrapped ones do the work. The process and the
driver are joined by a socket: messages go one way, the word to go on comes back.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import faulthandler
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

STEP, LOAD = "step", "load"


class Places:
    """Wraps what a run does, and stands still where it is told to.

    Args:
        spec: ``holds``: lists of an id, a place and the first step at which to stand still there;
            ``nan``: global batches in which the gradient is not a number;
            ``unreadable``: the step from which on data cannot be read, and how often (0: always);
            ``clock``: the step from which on, and hours by which ``time.time`` is off;
            ``full``: steps from and to which nothing can be written into checkpoints.
        link: to the driver.
    """

    def __init__(self, spec: dict[str, Any], link: socket.socket) -> None:
        self._spec, self._link = spec, link
        self._holds: list[list[Any]] = spec.get("holds", [])
        self._unread = 0

    def tell(self, **event: Any) -> None:
        """One message to the driver."""
        self._link.send(json.dumps(event).encode())

    def reach(self, place: str, step: int) -> None:
        """Stand still here, if told to, until the driver says go or ends the process."""
        for hold in [h for h in self._holds if h[1] == place and step >= h[2]]:
            self._holds.remove(hold)
            self.tell(event="hold", id=hold[0], place=place, step=step)
            self._link.recv(1)

    def wrap(self) -> None:
        """Put all wrappers into place."""
        self._wrap_steps()
        self._wrap_saves()
        self._wrap_load()

    def _wrap_steps(self) -> None:
        from megatron_lpa.engine.build import Engine
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
                with _cut_short(samples):
                    return load(samples, *arguments)
            return load(samples, *arguments)

        def with_nan(engine: Any, batches: Any, first_samples: Any, lr: float) -> Any:
            if first_samples[0] // engine.config.train.global_batch_size not in self._spec.get("nan", ()):
                return train_step(engine, batches, first_samples, lr)

            def spoil(module: Any, inputs: Any, output: Any) -> None:
                output.register_hook(lambda gradient: gradient * float("nan"))

            self.tell(event="nan", step=at_step)
            hook = engine.module.final_norm.register_forward_hook(spoil)
            try:
                return train_step(engine, batches, first_samples, lr)
            finally:
                hook.remove()

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
        from megatron_lpa.engine import resume

        restore = resume._restore

        def held_restore(*arguments: Any) -> None:
            self.reach(LOAD, 0)
            restore(*arguments)

        _put(resume, _restore=held_restore)

    def _wrap_saves(self) -> None:
        from megatron_lpa.engine import checkpoint, store, tensor_file

        write_tensors, write_durably, rename = checkpoint.write_tensors, store.write_durably, os.rename

        def held_tensors(folder: Path, *arguments: Any) -> Any:
            step = _step_in(str(folder))
            self.reach("before-state", step)
            first, last = self._spec.get("full", (0, -1))
            if first <= step <= last:
                self.tell(event="full", step=step)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            return write_tensors(folder, *arguments)

        def held_open(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = builtins.open(path, mode, *arguments, **options)  # noqa: SIM115 - closed by whoever opens it
            place = "weights-torn" if "/weights" in str(path) else "state-torn"
            return _HeldFile(file, lambda: self.reach(place, _step_in(str(path))))

        def held_durably(path: Path, text: str) -> None:
            if path.name != "manifest.json":
                return write_durably(path, text)
            step = _step_in(str(path))
            self.reach("manifest", step)
            if any(hold[1] == "manifest-torn" and step >= hold[2] for hold in self._holds):
                path.write_text(text[: len(text) // 2])
                self.reach("manifest-torn", step)
            return write_durably(path, text)

        def held_rename(source: Any, target: Any, **options: Any) -> None:
            name = Path(source).name
            publishing = name.startswith(".step_") and name.endswith(".partial")
            if publishing:
                self.reach("before-rename", _step_in(name))
            rename(source, target, **options)
            if publishing:
                self.reach("after-rename", _step_in(name))
            if Path(target).name.endswith(".removed"):
                self.reach("removing", _step_in(name))

        _put(checkpoint, write_tensors=held_tensors)
        _put(store, write_durably=held_durably)
        _put(os, rename=held_rename)
        _put(tensor_file, open=held_open)


@contextlib.contextmanager
def _cut_short(samples: Any) -> Iterator[None]:
    """For this process alone, the files of tokens end before their first token."""
    readers = {
        id(dataset.indexed): dataset.indexed._reader for dataset, _ in samples.giving(samples.num_samples)
    }
    kept = {reader: (reader._path, reader._file) for reader in readers.values()}
    with tempfile.NamedTemporaryFile(suffix=".bin") as empty:
        try:
            for reader in kept:
                reader._path, reader._file = Path(empty.name), open(empty.name, "rb", buffering=0)  # noqa: SIM115
            yield
        finally:
            for reader, (path, file) in kept.items():
                reader._file.close()
                reader._path, reader._file = path, file


class _HeldFile:
    """A file that stands still in the middle of its third write: behind the header, inside a tensor."""

    def __init__(self, file: Any, reach: Any) -> None:
        self._file, self._reach, self._writes = file, reach, 0

    def write(self, data: Any) -> None:
        self._writes += 1
        if self._writes == 3:
            half = len(data) // 2
            self._file.write(data[:half])
            self._file.flush()
            self._reach()
            data = data[half:]
        self._file.write(data)

    def __enter__(self) -> _HeldFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _put(owner: Any, **functions: Any) -> None:
    for name, function in functions.items():
        setattr(owner, name, function)


def _step_in(path: str) -> int:
    return int(path.rpartition("step_")[2][:8])


def run(spec: dict[str, Any], link: socket.socket) -> NoReturn:
    """Be one process of a run, from the command line in ``spec`` to the exit code."""
    from megatron_lpa.pretrain import leave, main

    faulthandler.enable()  # as the entry point does
    Places(spec, link).wrap()
    leave(main(spec["arguments"]))


if __name__ == "__main__":
    run(json.loads(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])))
