"""Where the processes of one launch meet, before any collective: who is missing, and who was started
otherwise.

They meet at a store of keys and values that rank 0 serves (PyTorch's ``TCPStore``; torchrun's agent, where
there is one). Nothing here is a collective, so processes that disagree about everything else can still say
so. All that travels is JSON.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron_lpa.errors import EXIT_REFUSED, RankError, RankHang, TryAgain, UserError, shown
from megatron_lpa.parallel.address import is_loopback, listener_at, master_address, why_unknown
from megatron_lpa.parallel.disagreement import disagreement, named
from megatron_lpa.parallel.launcher import another_port
from megatron_lpa.parallel.place import Place

Say = Callable[[str], None]

NOTE_AFTER_S = 10.0
"""Of waiting in silence for others; from then on, a line each minute."""

CALL = "megatron_lpa/call"
"""Where rank 0 calls."""

VERDICT_S = 10.0
"""For the other processes to read what rank 0 found, before it ends."""

OF_ONE_RUN = ("logging.name", "logging.run_dir")
"""Where these differ, two runs have met."""

_FOREVER_S = 10 * 365 * 86_400.0
_POLL_S = 0.05


class Meeting:
    """Where the processes of one launch have met.

    Args:
        place: of this process.
        shared: the store that all are joined to; it may have been used by earlier starts.
        prefix: of this start's keys, chosen by rank 0.
    """

    def __init__(self, place: Place, shared: dist.Store, prefix: str = "start") -> None:
        self.place, self._shared, self._prefix = place, shared, prefix
        self.store = dist.PrefixStore(prefix, shared)
        """For the process group, and for what is said here."""

    def connection(self) -> dist.Store | None:
        """Another connection to the store, for a thread of its own; None for a process alone."""
        if not isinstance(self._shared, dist.TCPStore):
            return None
        shared: Any = self._shared  # PyTorch's stubs do not know clone()
        return dist.PrefixStore(self._prefix, shared.clone())

    def told_by_first(self, message: str, within_s: float = 2.0) -> bool:
        """Whether rank 0 ends with this very error, and so prints it. Every process asks that ends with one.

        Rank 0 stays until the others have looked, ``within_s`` at most. One that finds the store gone tells
        by itself.
        """
        if self.place.world_size == 1:
            return True
        deadline_s = time.monotonic() + within_s
        try:
            if self.place.rank == 0:
                self.store.set("error", message)
                while (
                    self.store.add("error/read", 0) < self.place.world_size - 1
                    and time.monotonic() < deadline_s
                ):
                    time.sleep(_POLL_S)
                return True
            while not self.store.check(["error"]):
                if time.monotonic() >= deadline_s:
                    return False
                time.sleep(_POLL_S)
            same = self.store.get("error").decode() == message
            self.store.add("error/read", 1)
        except RuntimeError:
            return self.place.rank == 0
        return same


def meet(
    place: Place,
    facts: Mapping[str, Any],
    limit_s: float,
    enter: Say = lambda stage: None,
    say: Say | None = None,
) -> Meeting:
    """Wait for all processes of the launch, and compare what each was started with.

    A store may outlive a start (torchrun's agent keeps its own), and another run may use the same port. So
    rank 0 calls with a word of its own, each process answers that call with a word of its own, and a verdict
    counts for a process only if it repeats its word.

    Args:
        place: of this process.
        facts: what has to be equal on all, by the name that the user knows it by; JSON values.
        limit_s: seconds to wait; 0 for ever.
        enter: takes where this process is, in words that follow "rank 3 is".
        say: takes a line for the user when the wait is long.

    Raises:
        UserError: on all processes, with the ranks, hosts and names of what differs.
        TryAgain: on all processes: another run seems to use the port, or two processes say that they are one
            rank.
        RankHang: on all that are there: some process did not come within ``limit_s``.
        RankError: rank 0's machine has no such name or address, or another program or run has its port.
    """
    if place.world_size == 1:
        return Meeting(place, dist.HashStore())
    waiting = _Patience(limit_s or _FOREVER_S, enter, say or (lambda line: None))
    shared = _serve(place, waiting) if _serves(place) else _join(place, waiting)
    own = {"word": uuid.uuid4().hex, "host": place.host, "facts": {"WORLD_SIZE": place.world_size, **facts}}
    try:
        if place.rank == 0:
            word, verdict = own["word"], _call(shared, place, own, waiting)
        else:
            word, verdict = _answer(shared, place, own, waiting)
    except dist.DistError as error:
        raise RankError(
            f"{place}: rank 0 has ended, or was killed, while the processes met; look at its log"
        ) from error
    if verdict["kind"] == "missing":
        raise RankHang(verdict["message"])
    if verdict["kind"] != "fine":
        problem = (
            UserError(verdict["message"]) if verdict["kind"] == "unlike" else TryAgain(verdict["message"])
        )
        problem.known_to_all = True
        raise problem
    return Meeting(place, shared, f"megatron_lpa/{word}")


class _Patience:
    """How long a wait may take, and what is said meanwhile."""

    def __init__(self, limit_s: float, enter: Say, say: Say) -> None:
        self.since_s = time.monotonic()
        self._limit_s, self._enter, self._say, self._next_s = limit_s, enter, say, NOTE_AFTER_S
        self.doubt = ""
        """What may be why nobody comes."""

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.since_s

    @property
    def over(self) -> bool:
        return self.waited_s >= self._limit_s

    @property
    def long_over(self) -> bool:
        """Rank 0 knows more about who is missing, and has its say first."""
        return self.waited_s >= self._limit_s + VERDICT_S

    @property
    def left_s(self) -> float:
        return max(1.0, self._limit_s - self.waited_s)

    def tell(self, line: str) -> None:
        """Say a line now."""
        self._say(line)

    def pause(self, for_what: Callable[[], str]) -> None:
        """Wait a moment; say for what when it takes long. The wait has its own end, so no watchdog needs to
        count it."""
        self._enter("waiting for other ranks to start")
        if self.waited_s >= self._next_s:
            self._next_s += 60.0
            self._say(f"waiting for {for_what()}, for {self.waited_s:.0f} s now (train.start_timeout_s)")
        time.sleep(min(0.5, _POLL_S + self.waited_s / 20))


def _wait_until(done: Callable[[], bool], within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    with contextlib.suppress(dist.DistError):
        while not done() and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)


def _serves(place: Place) -> bool:
    """Torchrun's agent serves a store of its own, before any process starts."""
    return place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _launch_of() -> list[str | None]:
    """What tells this launch from others, where something does."""
    return [os.environ.get(name) for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")]


def _serve(place: Place, waiting: _Patience) -> dist.Store:
    host, port = master_address()
    while not _resolves(host, port, place, waiting):
        pass
    # Where all processes are on this machine, nobody else needs to reach the port.
    local = place.local_size >= place.world_size and is_loopback(host)
    try:
        listener = listener_at(port, local)
    except OSError as error:
        doubt = "if another run uses this port, " if error.errno == errno.EADDRINUSE else ""
        raise RankError(
            f"the processes cannot meet at {host}:{port}: {error.strerror}; {doubt}{another_port()}"
        ) from error
    store = dist.TCPStore(
        "127.0.0.1",  # whatever MASTER_ADDR is: PyTorch would wait for a wrong one without a word
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=waiting.left_s),
        master_listen_fd=listener.detach(),
    )
    try:
        socket.create_connection((host, port), timeout=min(5.0, waiting.left_s)).close()
    except OSError as error:
        waiting.doubt = (
            f"rank 0 ({place.host}) does not reach itself at {host}:{port} ({error}): MASTER_ADDR has to be its "  # noqa: E501
            "address"
        )
        waiting.tell(waiting.doubt)
    return store


def _resolves(host: str, port: int, place: Place, waiting: _Patience) -> bool:
    """Whether this machine knows the name; after a moment, if not."""
    if not (reason := why_unknown(host, port)):
        return True
    if waiting.over:
        raise RankError(
            f"{place}: MASTER_ADDR={shown(host)} is no name that this machine knows ({reason}); set it to "
            "rank 0's address"
        )
    waiting.pause(lambda: f"the name {shown(host)} (MASTER_ADDR) to resolve on {place.host}")
    return False


def _join(place: Place, waiting: _Patience) -> dist.Store:
    host, port = master_address()
    while True:
        if not _resolves(host, port, place, waiting):
            continue
        try:
            # PyTorch's client tries again by itself, but says so in many lines.
            socket.create_connection((host, port), timeout=min(10.0, waiting.left_s)).close()
            return dist.TCPStore(
                "127.0.0.1" if is_loopback(host) else host,
                port,
                is_master=False,
                wait_for_workers=False,
                timeout=datetime.timedelta(seconds=min(10.0, waiting.left_s)),
            )
        except (OSError, dist.DistError) as error:
            if waiting.over:
                raise RankHang(
                    f"{place}: rank 0 does not answer at {host}:{port} after {waiting.waited_s:.0f} s "
                    f"(train.start_timeout_s): {str(error)[:200]}; look at rank 0's log, whether this "
                    "machine reaches that address, and whether another program has that port"
                ) from error
            waiting.pause(lambda: f"rank 0 to answer {place} at {host}:{port}")


def _call(shared: dist.Store, place: Place, own: Mapping[str, Any], waiting: _Patience) -> dict[str, Any]:
    """Rank 0: call all, wait for their answers, and tell them what has been found."""
    store = dist.PrefixStore(f"megatron_lpa/{own['word']}", shared)
    call = {"word": own["word"], "launch": _launch_of(), "world_size": place.world_size}
    shared.set(CALL, json.dumps(call))
    answers, verdict = _gather(store, place, own, waiting)
    verdict |= {"words": {rank: answer["word"] for rank, answer in answers.items()}}
    store.set("verdict", json.dumps(verdict))
    _wait_until(lambda: store.add("verdict/read", 0) >= len(answers) - 1, VERDICT_S)
    return verdict


def _gather(
    store: dist.Store, place: Place, own: Mapping[str, Any], waiting: _Patience
) -> tuple[dict[int, Any], dict[str, Any]]:
    answers: dict[int, Any] = {0: own}
    while len(answers) < place.world_size:
        for rank in range(place.world_size):
            if rank not in answers and store.check([f"answer/{rank}"]):
                answers[rank] = json.loads(store.get(f"answer/{rank}"))
        missing = [rank for rank in range(place.world_size) if rank not in answers]
        if store.check(["twice"]):
            break
        if missing and waiting.over:
            return answers, {
                "kind": "missing",
                "message": f"{len(missing)} of {place.world_size} processes have not come after "
                f"{waiting.waited_s:.0f} s (train.start_timeout_s): rank {named(missing)}; "
                + (waiting.doubt or "look at their logs and machines"),
            }
        if missing:
            waiting.pause(partial(_to_start, missing, place.world_size))
    if store.check(["twice"]):
        return answers, {"kind": "twice", "message": store.get("twice").decode()}
    ranks = range(place.world_size)
    facts, hosts = [answers[rank]["facts"] for rank in ranks], [answers[rank]["host"] for rank in ranks]
    message = disagreement(facts, hosts)
    foreign = any(len({json.dumps(f.get(name)) for f in facts}) > 1 for name in OF_ONE_RUN)
    if foreign:
        message += f". Or another run uses port {master_address()[1]}: {another_port()}"
    return answers, {
        "kind": "fine" if not message else "foreign" if foreign else "unlike",
        "message": message,
    }


def _to_start(missing: Sequence[int], world_size: int) -> str:
    return f"{len(missing)} of {world_size} processes to start: rank {named(missing)}"


def _answer(
    shared: dist.Store, place: Place, own: Mapping[str, Any], waiting: _Patience
) -> tuple[str, dict[str, Any]]:
    """Another rank: answer rank 0's call, and the next one if that was of an earlier start; what rank 0 has
    found."""
    answered = ""
    while True:
        call = json.loads(shared.get(CALL)) if shared.check([CALL]) else {"word": ""}
        store = dist.PrefixStore(f"megatron_lpa/{call['word']}", shared)
        told = bool(call["word"]) and store.check(["verdict"])
        if call["word"] != answered and not told:  # one with a verdict is of an earlier start
            _check_call(call, place)
            answered = call["word"]
            if store.add(f"answer/{place.rank}/times", 1) > 1:
                store.set("twice", _twice(place))
            else:
                store.set(f"answer/{place.rank}", json.dumps(own))
        elif told and call["word"] == answered:
            verdict: dict[str, Any] = json.loads(store.get("verdict"))
            if verdict["kind"] == "twice" or verdict["words"].get(str(place.rank)) == own["word"]:
                store.add("verdict/read", 1)
                return answered, verdict
        if waiting.long_over:
            if told and call["word"] != answered and store.check([f"answer/{place.rank}"]):
                raise RankHang(
                    f"{place}: another process is this rank already, and trains; look at what the launcher "
                    f"sets as RANK. Or rank 0 has not come, for {waiting.waited_s:.0f} s "
                    "(train.start_timeout_s): look at its log"
                )
            raise RankHang(
                f"{place}: rank 0 has not seen all processes after {waiting.waited_s:.0f} s "
                "(train.start_timeout_s); look at its log for those that are missing"
            )
        waiting.pause(lambda: "rank 0 to compare all processes")


def _check_call(call: Mapping[str, Any], place: Place) -> None:
    if any(
        theirs and ours and theirs != ours for theirs, ours in zip(call["launch"], _launch_of(), strict=True)
    ):
        raise RankError(
            f"{place}: another run's rank 0 answers at port {master_address()[1]}; {another_port()}"
        )
    if place.rank >= call["world_size"]:
        raise RankError(
            f"{place} was started with WORLD_SIZE={place.world_size}, but rank 0 with {call['world_size']}; "
            "start all processes by one command",
            EXIT_REFUSED,
        )


def _twice(place: Place) -> str:
    return (
        f"two processes say that they are rank {place.rank}, one of them on {place.host}; look at what the "
        "launcher sets as RANK, and whether another run uses this port"
    )
