"""Where the processes of one launch meet, before any collective: who is missing, and who was started otherwise.

They meet at a store of keys and values that rank 0 serves (PyTorch's ``TCPStore``; torchrun's agent, where there is one).
Nothing here is a collective, so processes that disagree about everything else can still say so. All that travels is JSON.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_lpa.errors import RankError, RankHang, UserError
from megatron_lpa.parallel.disagreement import disagreement, named

Say = Callable[[str], None]

NOTE_AFTER_S = 10.0
"""Of waiting in silence for others; from then on, a line each minute."""

NAME_S = 60.0
"""For the name of the first machine to resolve."""

VERDICT_S = 10.0
"""For the other processes to read what rank 0 found, before it ends."""

_FOREVER_S = 10 * 365 * 86_400.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Place:
    """Where a process stands in its launch, as ``deepspeed``, ``torchrun`` or ``srun`` tell it.

    Args:
        rank: from 0.
        world_size: processes in all.
        local_rank: from 0, on this machine.
        local_size: processes on this machine; all, where nothing says so.
        host: this machine's name.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host})"


def place_from_environment() -> Place:
    """From ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, and ``LOCAL_WORLD_SIZE`` or ``LOCAL_SIZE``.

    Raises:
        UserError: one of them is no number, or they do not fit together.
    """

    def number(default: str, *names: str) -> int:
        for name in names:
            if text := os.environ.get(name):
                try:
                    return int(text)
                except ValueError:
                    raise UserError(f"{name} is {text[:40]!r}, but must be a whole number") from None
        return int(default)

    world_size = number("1", "WORLD_SIZE")
    place = Place(
        number("0", "RANK"),
        world_size,
        number("0", "LOCAL_RANK"),
        number(str(world_size), "LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
        socket.gethostname(),
    )
    if not 0 <= place.rank < world_size or place.local_rank < 0:
        raise UserError(
            f"RANK={place.rank}, WORLD_SIZE={world_size} and LOCAL_RANK={place.local_rank} do not fit together; start "
            "through a launcher"
        )
    return place


class Meeting:
    """The store at which the processes have met.

    Args:
        place: of this process.
        shared: the store that all are joined to.
    """

    def __init__(self, place: Place, shared: dist.Store) -> None:
        self.place, self._shared = place, shared
        self.store = _prefixed(shared)
        """For the process group, and for what is said here."""

    def connection(self) -> dist.Store | None:
        """Another connection to the store, for a thread of its own; None for a process alone."""
        if not isinstance(self._shared, dist.TCPStore):
            return None
        shared: Any = self._shared  # PyTorch's stubs do not know clone()
        return _prefixed(shared.clone())

    def told_by_first(self, message: str, within_s: float = 2.0) -> bool:
        """Whether rank 0 ends with this very error, and so prints it. Every process asks that ends with one.

        Rank 0 stays until the others have looked, ``within_s`` at most. One that finds the store gone tells by itself.
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
        except (dist.DistError, RuntimeError):
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

    Args:
        place: of this process.
        facts: what has to be equal on all, by the name that the user knows it by; JSON values.
        limit_s: seconds to wait; 0 for ever.
        enter: takes where this process is, in words that follow "rank 3 is".
        say: takes a line for the user when the wait is long.

    Raises:
        UserError: on all processes, with the ranks, hosts and names of what differs; or two say that they are one rank.
        RankHang: on all that are there: some process did not come within ``limit_s``.
        RankError: rank 0's machine has no such name or address, or another program has its port.
    """
    if place.world_size == 1:
        return Meeting(place, dist.HashStore())
    waiting = _Patience(limit_s or _FOREVER_S, enter, say or (lambda line: None))
    meeting = Meeting(place, _serve(place, waiting) if _serves(place) else _join(place, waiting))
    store = meeting.store
    key = f"came/{place.rank}"
    if store.add(f"{key}/times", 1) > 1:
        raise _refuse(store, f"two processes say that they are rank {place.rank}, one of them on {place.host}; look at what "
                      "the launcher sets as RANK, and whether another run uses this port")  # fmt: skip
    store.set(key, json.dumps({"host": place.host, "facts": {"WORLD_SIZE": place.world_size, **facts}}))
    store.add("came", 1)
    if place.rank == 0:
        verdict = _verdict(store, place, waiting)
        store.set("verdict", json.dumps(verdict))
        _wait_until(lambda: store.add("verdict/read", 0) >= store.add("came", 0) - 1, VERDICT_S)
    else:
        verdict = _read_verdict(store, place, waiting)
        if place.rank >= verdict["world_size"]:
            raise RankError(
                f"{place} was started with WORLD_SIZE={place.world_size}, but rank 0 with {verdict['world_size']}; start all "
                "processes by one command"
            )
    if verdict["kind"] == "missing":
        raise RankHang(verdict["message"])
    if verdict["kind"] == "refused":
        refused = UserError(verdict["message"])
        refused.known_to_all = True
        raise refused
    return meeting


class _Patience:
    """How long a wait may take, and what is said meanwhile."""

    def __init__(self, limit_s: float, enter: Say, say: Say) -> None:
        self.since_s = time.monotonic()
        self._limit_s, self._enter, self._say, self._next_s = limit_s, enter, say, NOTE_AFTER_S

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

    def pause(self, for_what: Callable[[], str]) -> None:
        """Wait a moment; say for what when it takes long. The wait has its own end, so no watchdog needs to count it."""
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


def _address() -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT")
    if port is None:
        raise UserError("WORLD_SIZE is above 1 but MASTER_PORT is not set; start through a launcher")
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"MASTER_PORT is {port[:40]!r}, but must be a number from 1 to 65535")
    return host, int(port)


def _serves(place: Place) -> bool:
    """Torchrun's agent serves a store of its own, before any process starts."""
    return place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _prefixed(store: dist.Store) -> dist.Store:
    """A start of its own keys: torchrun's agent keeps its store when it starts processes again."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    return store if attempt is None else dist.PrefixStore(f"megatron_lpa/attempt_{attempt}", store)


def _serve(place: Place, waiting: _Patience) -> dist.Store:
    host, port = _address()
    # Where all processes are on this machine, nobody else needs to reach the port.
    local = place.local_size >= place.world_size and _is_loopback(host)
    dual = socket.has_dualstack_ipv6() and not local
    try:
        listener = socket.create_server(
            ("127.0.0.1" if local else "", port),
            family=socket.AF_INET6 if dual else socket.AF_INET,
            backlog=4096,
            dualstack_ipv6=dual,
        )
    except OSError as error:
        hint = (
            "give the launcher another --master_port"
            if error.errno == errno.EADDRINUSE
            else "choose another port"
        )
        raise RankError(
            f"the processes cannot meet at {host}:{port}: {error.strerror}; if another run uses this port, {hint}"
        ) from error
    return dist.TCPStore(
        "127.0.0.1" if _is_loopback(host) else host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=waiting.left_s),
        master_listen_fd=listener.detach(),
    )


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET)
    except OSError:
        return False
    return all(address[4][0] == "127.0.0.1" for address in found)


def _join(place: Place, waiting: _Patience) -> dist.Store:
    host, port = _address()
    while True:
        try:
            # PyTorch's client tries again by itself, but says so in many lines.
            socket.create_connection((host, port), timeout=min(10.0, waiting.left_s)).close()
            break
        except socket.gaierror as error:
            if waiting.over or waiting.waited_s > NAME_S:
                raise RankError(
                    f"{place}: MASTER_ADDR={host} is no name that this machine knows ({error.strerror}); set it to rank 0's "
                    "address"
                ) from error
            waiting.pause(lambda: f"the name {host} (MASTER_ADDR) to resolve on {place.host}")
        except OSError as error:
            if waiting.over:
                raise RankHang(
                    f"{place}: rank 0 does not answer at {host}:{port} after {waiting.waited_s:.0f} s "
                    f"(train.start_timeout_s): {error}; look at rank 0's log, and whether this machine reaches that address"
                ) from error
            waiting.pause(lambda: f"rank 0 to answer {place} at {host}:{port}")
    try:
        return dist.TCPStore(
            "127.0.0.1" if _is_loopback(host) else host,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=waiting.left_s),
        )
    except dist.DistError as error:
        raise RankError(
            f"{place}: what answers at {host}:{port} is not rank 0 of this launch; give the launcher another --master_port"
        ) from error


def _verdict(store: dist.Store, place: Place, waiting: _Patience) -> dict[str, Any]:
    """What rank 0 finds, once all are there or time is up."""
    size = place.world_size

    def missing() -> list[int]:
        return [rank for rank in range(size) if not store.check([f"came/{rank}"])]

    while store.add("came", 0) < size or missing():
        if store.check(["refused"]):
            break
        if waiting.over:
            absent = missing()
            return {
                "kind": "missing",
                "world_size": size,
                "message": f"{len(absent)} of {size} processes have not come after {waiting.waited_s:.0f} s "
                f"(train.start_timeout_s): rank {named(absent)}; look at their logs and machines",
            }
        waiting.pause(lambda: f"{len(missing())} of {size} processes to start: rank {named(missing())}")
    if store.check(["refused"]):
        return {"kind": "refused", "message": store.get("refused").decode(), "world_size": size}
    came = [json.loads(store.get(f"came/{rank}")) for rank in range(size)]
    message = disagreement([c["facts"] for c in came], [c["host"] for c in came])
    return {"kind": "refused" if message else "fine", "message": message, "world_size": size}


def _read_verdict(store: dist.Store, place: Place, waiting: _Patience) -> dict[str, Any]:
    try:
        while not store.check(["verdict"]):
            if waiting.long_over:
                raise RankHang(
                    f"{place}: rank 0 has not seen all processes after {waiting.waited_s:.0f} s (train.start_timeout_s); look "
                    "at its log for those that are missing"
                )
            waiting.pause(lambda: "rank 0 to compare all processes")
        verdict: dict[str, Any] = json.loads(store.get("verdict"))
        store.add("verdict/read", 1)
    except dist.DistError as error:
        raise RankError(
            f"{place}: rank 0 has ended, or was killed, while the processes met; look at its log"
        ) from error
    return verdict


def _refuse(store: dist.Store, message: str) -> UserError:
    store.set("refused", message)
    return RankError(message)
