"""From steps to records: averages over an interval, throughput, MFU; and where records go."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Mapping, Sequence

import torch

from megatron_lpa.checkpoint.progress import NOTHING_UNRECORDED, Unrecorded
from megatron_lpa.checkpoint.resume import Resumed
from megatron_lpa.errors import TryAgain, UserError, shown
from megatron_lpa.parallel.agreement import gather_numbers, largest_of_all, together
from megatron_lpa.planning.flops import flops_per_token_training
from megatron_lpa.record_values import CannotRecord, finished
from megatron_lpa.records import Record
from megatron_lpa.train.callbacks.callback import SAID, Callback, Sink, StepReport
from megatron_lpa.train.hardware import peak_flops_per_second, peak_memory_bytes
from megatron_lpa.train.state import Run

logger = logging.getLogger(__name__)


class Metrics(Callback):
    """Makes one record per logging interval and hands every record to all sinks on rank 0.

    Losses stay on the device until the interval ends or a checkpoint is written, so that the steps between
    never wait for it. A mean is over all steps since the last record, also those before a stop; times are
    those of this start.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = list(sinks)
        self._as_text: set[tuple[str, str]] = set()
        self._losses: list[torch.Tensor] = []
        self._unrecorded = NOTHING_UNRECORDED
        self._untold: tuple[str, ...] = ()
        self._timed_steps = 0
        self._step_s = self._data_wait_s = 0.0

    def on_start(self, run: Run) -> None:
        """Open all sinks, once each has seen what an earlier start left; go on with the interval of the
        stop."""
        if run.resumed is not None:
            self._unrecorded = run.resumed.unrecorded
        # Not told before the first step: a start that trains no step has changed nothing.
        self._untold = run.changes

        def open_sinks() -> int:
            for hook in ("look", "open"):
                for sink in list(self.sinks) if run.is_main else ():
                    try:
                        getattr(sink, hook)(run)
                    except UserError:
                        raise
                    except Exception as error:
                        self._give_up(sink, error, run)
            return len(self.sinks)

        together(open_sinks, run.engine.groups)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Collect, and emit at the end of an interval.

        The loss is the mean over the steps that have a finite one; the others changed nothing.
        """
        for change in self._untold:
            self.emit(run, {"kind": "event", "message": change, SAID: "note"})
        self._untold = ()
        self._losses.append(report.result.loss)
        self._timed_steps += 1
        self._step_s += report.step_s
        self._data_wait_s += report.data_wait_s
        if run.progress.step % run.config.logging.interval and run.progress.step != run.steps:
            return
        steps = self._timed_steps
        waiting = time.perf_counter()
        loss = self.unrecorded(run).mean()
        self._step_s += time.perf_counter() - waiting  # for work that the steps only launched on a GPU
        waits_s = gather_numbers(run.stopping.take_waited_s(), run.engine.groups)
        tokens = steps * run.config.train.global_batch_size * run.config.model.sequence_length
        rate = tokens / self._step_s
        flops = rate * flops_per_token_training(run.config.model) / run.engine.groups.world_size
        peak = peak_flops_per_second(run.config.logging.peak_tflops)
        self.emit(
            run,
            {
                "kind": "train",
                "step": run.progress.step,
                "tokens": run.progress.consumed_tokens,
                "samples": run.progress.consumed_samples,
                "loss": math.nan if loss is None else loss,
                "lr": report.lr,
                "grad_norm": float(report.result.grad_norm),
                "tokens_per_second": rate,
                "step_ms": 1000 * self._step_s / steps,
                "data_wait_ms": 1000 * self._data_wait_s / steps,
                "model_flops_per_second_per_device": flops,
                "mfu": None if peak is None else flops / peak,
                "memory_peak_bytes": peak_memory_bytes(),
                "skipped_steps": run.engine.skipped_steps,
                **_straggler(waits_s, steps),
            },
        )
        self._forget()

    def unrecorded(self, run: Run) -> Unrecorded:
        """The losses since the last training record, for a checkpoint of this step. Every rank calls it."""
        if self._losses:
            means = run.engine.mean_over_replicas(torch.stack(self._losses))
            self._unrecorded = self._unrecorded.and_then(means.tolist())
            self._losses.clear()
        return self._unrecorded

    def has_record(self, run: Run, kind: str) -> bool:
        """Whether ``metrics.jsonl`` has a record of this step. Every rank calls it."""
        has = any(sink.has_record(kind, run.progress.step) for sink in self.sinks) if run.is_main else False
        return bool(largest_of_all(has, run.engine.groups))

    def _forget(self) -> None:
        self._losses.clear()
        self._unrecorded = NOTHING_UNRECORDED
        self._timed_steps = 0
        self._step_s = self._data_wait_s = 0.0

    def on_event(self, run: Run, message: str) -> None:
        """Record it, and say it where warnings go."""
        if run.is_main:
            logger.warning(message)
        self.emit(run, {"kind": "event", "message": message, SAID: "warning"})

    def after_rollback(self, run: Run, resumed: Resumed) -> None:
        """Forget the steps since the last record, and let sinks drop what will come again."""
        self._forget()
        self._unrecorded = resumed.unrecorded
        if not run.is_main:
            return
        for sink in list(self.sinks):
            try:
                sink.rewind(run)
            except Exception as error:
                self._give_up(sink, error, run)

    def emit(self, run: Run, record: Record) -> None:
        """Hand a record to all sinks; called on every rank, acts on rank 0.

        Args:
            run: the run. Where the record is none that tools can read, that is its problem: all ranks stop at
                the next agreement, with a checkpoint.
            record: as ``finished`` takes it. It needs a kind; ours are train, valid, test and event.
        """
        if not run.is_main:
            return
        kind = shown(record.get("kind") if isinstance(record, Mapping) else record)
        try:
            record, as_text = finished(record, run.progress.step, time.time())
        except CannotRecord as problem:
            message = f"a callback's record of the kind {kind} cannot be written: {problem}"
            run.stopping.report(UserError(message))
            return
        for key in as_text:
            if (kind, key) not in self._as_text:
                self._as_text.add((kind, key))
                words = "JSON has nothing for it, and it is written as text"
                logger.warning(f"{key} of records of the kind {kind}: {words}")
        for sink in list(self.sinks):
            try:
                sink.write(record)
            except Exception as error:
                self._give_up(sink, error, run)

    def _give_up(self, sink: Sink, error: Exception, run: Run) -> None:
        """A required sink ends the run at the next agreement; a view is switched off."""
        if sink.required:
            if not isinstance(error, UserError):
                error = TryAgain(f"{run.folder}: metrics cannot be written: {error}")
            run.stopping.report(error)
            return
        self.sinks.remove(sink)
        name, reason = type(sink).__name__, f"{type(error).__name__}: {error}"
        logger.warning(f"{name} is switched off: {reason}")

    def on_finish(self, run: Run) -> None:
        """Bring out what could not be written before; what still cannot be is a problem now."""
        for sink in list(self.sinks) if run.is_main else ():
            try:
                sink.flush()
            except Exception as error:
                self._give_up(sink, error, run)

    def close(self, run: Run) -> None:
        """Close all sinks."""
        if run.is_main:
            for sink in self.sinks:
                with contextlib.suppress(Exception):  # what failed has been reported where it was written to
                    sink.close()


def _straggler(waits_s: Sequence[float], steps: int) -> dict[str, float]:
    """The rank that the others waited for before steps, and for how long (ms per step)."""
    if len(waits_s) == 1:
        return {}
    late_s = max(waits_s) - min(waits_s)
    return {"slowest_rank": waits_s.index(min(waits_s)), "slowest_rank_late_ms": 1000 * late_s / steps}
