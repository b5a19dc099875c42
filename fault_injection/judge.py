"""What one start may end with, given what struck it."""

from __future__ import annotations

import signal

from fault_injection.checks import of_logs
from fault_injection.fault_plan import INTERVAL, Fault
from fault_injection.kinds import ENDING, STOPPING
from fault_injection.one_start import Start
from megatron_lpa.errors import EXIT_HANG, EXIT_REFUSED


def of_start(start: Start) -> list[str]:
    """Violations: exit codes, lines of errors, tracebacks."""
    ranks = start.ranks
    if start.hung:
        return ["did not end and was killed"]
    found = of_logs(ranks.text("err"))
    struck = [result.fault for result in start.struck.values()]
    ending = [fault for fault in struck if fault.kind in ENDING]
    full = [fault for fault in struck if fault.kind == "disk-full"]
    codes = ranks.codes
    described = ", ".join(str(codes[rank]) for rank in sorted(codes))
    if ending:
        if wrong := _wrong(start, ending[0]):
            found.append(f"exit codes {described}: {wrong}")
    elif full:
        if wrong := _wrong_of_full_disk(start):
            found.append(f"exit codes {described}: {wrong}")
    elif start.unreadable is not None:
        if set(codes.values()) != {1}:
            found.append(f"exit codes {described} where data cannot be read: 1 was due")
    elif set(codes.values()) != {0}:
        found.append(f"exit codes {described} where nothing was to end the run")
    told = [line for text in ranks.text("err") for line in text.splitlines() if line.startswith("error: ")]
    if set(codes.values()) == {1} and len(told) != 1:
        found.append(f"{len(told)} lines of errors where one was due")
    if not any(codes.values()) and told:
        found.append(f"complete, with an error in the log: {told[0][:200]}")
    return found


def _wrong(start: Start, fault: Fault) -> str:
    codes, ended_by_us = start.ranks.codes, start.ranks.ended_by_us
    if fault.kind.startswith("kill"):
        if start.trained and ended_by_us:
            return f"{sorted(ended_by_us)} did not leave by themselves when another was gone"
        for rank, code in codes.items():
            allowed = {0, 1}
            if rank in start.killed:
                allowed = {-signal.SIGKILL, 0, 1}  # it may have ended just before
            elif rank in ended_by_us:
                allowed |= {-signal.SIGTERM, 128 + signal.SIGTERM}
            if code not in allowed:
                return f"rank {rank}'s is none of {sorted(allowed)}"
        return ""
    if fault.kind in STOPPING:
        due = 128 + getattr(signal, fault.variant)
        return "" if set(codes.values()) == {due} else f"{due} was due"
    if fault.kind == "stop-for-ever":
        others = {code for rank, code in codes.items() if rank not in start.killed}
        return "" if others == {EXIT_HANG} else f"{EXIT_HANG} was due for those that did not stand still"
    if fault.kind == "hang-start":
        return "" if set(codes.values()) == {EXIT_HANG} else f"{EXIT_HANG} was due for all"
    if fault.kind == "open-error-lasting" and fault.variant.startswith("config "):
        # The others have not met it yet: a launcher ends them.
        return _wrong_where_one_is_alone(start, fault)
    return "" if set(codes.values()) == {1} else "1 was due"


def _wrong_where_one_is_alone(start: Start, fault: Fault) -> str:
    ended = {-signal.SIGTERM, 128 + signal.SIGTERM}
    for rank, code in start.ranks.codes.items():
        waiting = rank in start.ranks.ended_by_us and rank != fault.rank % len(start.ranks.codes)
        if code != 1 and not (waiting and code in ended):
            return f"rank {rank}'s is not 1"
    return ""


def _wrong_of_full_disk(start: Start) -> str:
    """A failed save ends the run where the config or its last checkpoint says so, and is no matter otherwise.

    Nor are records that cannot be written, as long as there is room again before the run ends.
    """
    codes = set(start.ranks.codes.values())
    stops = start.scenario.on_failure == "stop"
    may_end = stops or start.reached >= start.scenario.steps - 1
    if codes == {0}:
        return ""
    # Whoever asks for a stop does not want another start.
    due = EXIT_REFUSED if stops else 1
    return (
        "" if may_end and codes == {due} else f"a full disk ends the run with {due} where the config says so"
    )


def of_progress(start: Start, newest: int, previous_failures: int) -> list[str]:
    """Violations of what may be lost.

    Args:
        start: that has ended.
        newest: step of the newest sound checkpoint.
        previous_failures: saves that failed one after another before this start.
    """
    found = []
    failed = start.failed_saves() + previous_failures
    allowed = INTERVAL * (1 + start.scenario.overlap + failed)
    if start.reached - newest > allowed:
        found.append(
            f"{start.reached} steps were done and the newest checkpoint has {newest}: more than {allowed} "
            "lost"
        )
    back = start.went_back_to()
    signals = [r.fault for r in start.struck.values() if r.fault.kind in STOPPING]
    if back and newest >= back[-1]:
        # Later checkpoints are gone on purpose, and steps behind it are done again.
        since = [fault for fault in signals if start.backs_before.get(fault.number) == len(back)]
        return found + (_of_signal(max(start.at.values()), newest) if since else [])
    if newest < start.base:
        found.append(f"the run went on from {start.base} and now has {newest} at most")
    if signals:
        found += _of_signal(start.reached, newest)
    kinds = {result.fault.kind for result in start.struck.values()}
    if kinds & {"read-error", "read-error-lasting"} and "disk-full" not in kinds and newest != start.reached:
        found.append(
            f"ended in order after {start.reached} steps, as data cannot be read, with a checkpoint of "
            f"{newest}"
        )
    return found


def _of_signal(done: int, newest: int) -> list[str]:
    return (
        [] if newest == done else [f"stopped by a signal after {done} steps, with a checkpoint of {newest}"]
    )
