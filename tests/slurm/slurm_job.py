"""What SLURM says of its jobs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What ``scontrol`` says of a job or of one task of an array.

    Args:
        name: ``12``, or ``12_3`` for task 3 of array 12; tasks that wait share one entry, as ``12_0-3``.
        state: as ``RUNNING``.
        exit_code: of the batch script.
        signal: that ended the batch script, or 0.
        restarts: how often it was requeued.
        reason: why it waits.
        nodes: as SLURM writes them.
        output: the file of its standard output.
    """

    name: str
    state: str
    exit_code: int
    signal: int
    restarts: int
    reason: str
    nodes: str
    output: Path


def parse_jobs(printed: str) -> list[Job]:
    """The jobs in the output of ``scontrol --oneliner show job``, in order."""
    jobs = [_parsed(line) for line in printed.splitlines() if line.strip()]
    return sorted(jobs, key=lambda job: [int(number) for number in re.findall(r"\d+", job.name)])


def _parsed(line: str) -> Job:
    # "Key=value Key=value"; values may hold blanks, keys do not.
    fields = dict(re.findall(r"(?:^|(?<=\s))([A-Z][\w/:]*)=(.*?)(?=\s[A-Z][\w/:]*=|\s*$)", line))
    task = fields.get("ArrayTaskId")
    code, _, signal = fields["ExitCode"].partition(":")
    return Job(
        name=fields["JobId"] if task is None else f"{fields['ArrayJobId']}_{task}",
        state=fields["JobState"],
        exit_code=int(code),
        signal=int(signal),
        restarts=int(fields["Restarts"]),
        reason=fields["Reason"],
        nodes=fields["NodeList"],
        output=Path(fields.get("StdOut", os.devnull)),
    )
