"""Processes of one launch meet before any collective: who is missing, and who was started otherwise, is said
by name."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from fault_injection.launches import free_port
from megatron_lpa.errors import RankError, RankHang, UserError
from megatron_lpa.parallel import meeting
from megatron_lpa.parallel.meeting import Meeting, meet
from megatron_lpa.parallel.place import Place, place_from_environment

HOST = socket.gethostname()
REAL_RANK = "RANK_OF_TEST"


def place(rank: int, size: int) -> Place:
    return Place(rank, size, rank, size, f"node{rank}")


def met(
    ports: int, places: list[Place | None], facts: list[dict[str, Any]], limit_s: float, after_s: float = 0.0
) -> Any:
    """What ``meet`` did in this process; its place and facts are those of its real rank."""
    rank = int(os.environ["RANK"])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports))
    own, notes = places[rank], []
    if own is None:
        return None
    time.sleep(after_s * rank)
    meeting.NOTE_AFTER_S = 0.3
    try:
        found = meet(own, facts[rank], limit_s, say=notes.append)
        told = found.told_by_first("an error" if rank < 2 else "another", within_s=1.0)
        return "met", told, notes
    except UserError as error:
        return type(error).__name__, str(error), error.exit_code, notes


ALIKE = {"optim.lr": 0.1, "data.blend": {"a": 1}, "code": "abc"}


def test_processes_that_are_alike_go_on_and_one_tells_for_all(world: Any) -> None:
    results = world(4).run(met, free_port(), [place(rank, 4) for rank in range(4)], [ALIKE] * 4, 20.0)
    assert [result[0] for result in results] == ["met"] * 4
    assert [result[1] for result in results] == [True, True, False, False], (
        "rank 2 and 3 end with an error of their own"
    )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"optim.lr": 0.2}, "optim.lr is 0.2 on rank 2 (node2), but 0.1 on rank 0 (node0)"),
        ({"code": "abd"}, 'code is "abd" on rank 2 (node2), but "abc" on rank 0 (node0)'),
        ({"new": None}, "new is null on rank 2 (node2), but not there on rank 0 (node0)"),
        (
            {"data.blend": {"a": 2}},
            'data.blend is {"a": 2} on rank 2 (node2), but {"a": 1} on rank 0 (node0)',
        ),
    ],
)
def test_what_differs_is_named_on_every_rank(world: Any, changed: dict[str, Any], words: str) -> None:
    facts = [ALIKE, ALIKE, {**ALIKE, **changed}, ALIKE]
    results = world(4).run(met, free_port(), [place(rank, 4) for rank in range(4)], facts, 20.0)
    for kind, message, code, _ in results:
        assert (kind, code) == ("UserError", 78) and words in message
        assert message.count(" is ") == 1, "nothing else differs"


def test_a_process_that_does_not_come_is_named(world: Any) -> None:
    results = world(2).run(met, free_port(), [place(rank, 4) for rank in range(2)], [ALIKE] * 2, 2.0)
    for kind, message, code, _ in results:
        assert (kind, code) == ("RankHang", 75) and "2 of 4 processes have not come" in message
        assert "rank 2, 3" in message and "train.start_timeout_s" in message
    assert any("2 of 4 processes to start: rank 2, 3" in note for note in results[0][3]), "and not in silence"


def test_without_rank_0_the_others_say_where_they_look_for_it(world: Any) -> None:
    port = free_port()
    _, (kind, message, code, notes) = world(2).run(met, port, [None, place(1, 2)], [ALIKE] * 2, 1.5)
    assert (kind, code) == ("RankHang", 75)
    assert "rank 1 (node1): rank 0 does not answer at 127.0.0.1" in message and str(port) in message
    assert notes and "rank 0 to answer" in notes[0]


def test_two_processes_of_one_rank_are_told_apart(world: Any) -> None:
    places = [place(0, 3), place(1, 3), place(1, 3), place(2, 3)]
    results = world(4).run(met, free_port(), places, [ALIKE] * 4, 20.0)
    assert all("two processes say that they are rank 1" in result[1] for result in results), results
    assert {result[2] for result in results} == {1}, "who uses whose port is not for good"


def test_a_run_that_finds_another_one_at_its_port_says_so(world: Any) -> None:
    facts = [{**ALIKE, "logging.name": name} for name in ("mine", "theirs")]
    results = world(2).run(met, free_port(), [place(rank, 2) for rank in range(2)], facts, 20.0)
    for kind, message, code, _ in results:
        assert (
            (kind, code) == ("TryAgain", 1)
            and "another run uses port" in message
            and "logging.name" in message
        )


def met_as_job(port: int, jobs: list[str], limit_s: float) -> Any:
    os.environ["SLURM_JOB_ID"] = jobs[int(os.environ["RANK"])]
    try:
        return met(port, [place(rank, 2) for rank in range(2)], [ALIKE] * 2, limit_s)
    finally:
        del os.environ["SLURM_JOB_ID"]


def test_a_process_of_another_job_is_turned_away_and_does_no_harm(world: Any) -> None:
    mine, theirs = world(2).run(met_as_job, free_port(), ["17", "18"], 2.0)
    assert theirs[0] == "RankError" and "another run's rank 0 answers at port" in theirs[1]
    assert mine[0] == "RankHang" and "rank 1" in mine[1]


def met_again(port: int, starts: int) -> list[Any]:
    """As under torchrun, whose agent serves one store for all starts: rank 0 is late in each but the
    first."""
    rank, results = int(os.environ["RANK"]), []
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    agent = meeting._serve(place(0, 2), meeting._Patience(5.0, str, str)) if rank == 0 else None
    try:
        for start in range(starts):
            # The count of starts is each agent's own: a replaced one begins anew.
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(start if rank == 0 else 0)
            time.sleep(0.4 * start * (rank == 0))
            found = meet(place(rank, 2), {"start": start}, 20.0)
            found.store.add("together", 1)
            while found.store.add("together", 0) < 2:
                time.sleep(0.02)
            results.append(found._prefix)
    finally:
        for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
            os.environ.pop(name, None)
    found.store.add("done", 1)
    while agent is not None and found.store.add("done", 0) < 2:
        time.sleep(0.02)
    return results


def test_a_store_that_outlives_a_start_is_met_at_again(world: Any) -> None:
    first, second = world(2).run(met_again, free_port(), 3)
    assert first == second and len(set(first)) == 3, "each start has keys of its own"


def left_time(port: int) -> Any:
    rank = int(os.environ["RANK"])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    time.sleep(2.0 * (rank == 0))
    found = meet(place(rank, 2), {}, 4.0)
    time.sleep(5.0 * (rank == 0))
    found.store.set_timeout(datetime.timedelta(seconds=60))  # as joining the process group does
    if rank == 0:
        found.store.set("id", "x")
    value = found.store.get("id")
    found.store.add("read", 1)
    while rank == 0 and found.store.add("read", 0) < 2:
        time.sleep(0.02)
    return value


def test_what_was_left_of_a_wait_is_no_limit_of_what_follows(world: Any) -> None:
    assert world(2).run(left_time, free_port()) == [b"x", b"x"]


def test_another_number_of_processes_is_named(world: Any) -> None:
    port = free_port()
    results = world(2).run(met, port, [place(0, 2), place(1, 4)], [ALIKE] * 2, 10.0)
    assert all("WORLD_SIZE is 4 on rank 1 (node1), but 2 on rank 0" in result[1] for result in results), (
        results
    )
    first, (kind, message, code, _) = world(2).run(
        met, free_port(), [place(0, 2), place(3, 4)], [ALIKE] * 2, 2.0
    )
    assert first[0] == "RankHang" and kind == "RankError" and "WORLD_SIZE=4, but rank 0 with 2" in message
    assert code == 78


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["no-such-host.invalid", "x" * 70 + ".com", "a..b"])
def test_a_name_that_does_not_resolve_is_said(monkeypatch: pytest.MonkeyPatch, rank: int, name: str) -> None:
    monkeypatch.setenv("MASTER_ADDR", name)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(meeting, "NOTE_AFTER_S", 0.2)
    notes: list[str] = []
    with pytest.raises(RankError, match=rf"rank {rank} .* MASTER_ADDR='{name[:20]}.* is no name") as raised:
        meet(place(rank, 2), {}, 1.0, say=notes.append)
    assert raised.value.exit_code == 1 and notes and "to resolve" in notes[0]


def test_an_address_that_is_empty_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", " ")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="MASTER_ADDR is empty") as raised:
        meet(place(0, 2), {}, 1.0)
    assert raised.value.exit_code == 78


def test_a_rank_0_that_is_not_at_the_address_says_so_and_counts_who_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """192.0.2.0/24 is nobody's (RFC 5737)."""
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    notes: list[str] = []
    words = r"rank 0 \(node0\) does not reach itself at 192.0.2.1"
    with pytest.raises(RankHang, match=rf"1 of 2 processes have not come .* rank 1; {words}"):
        meet(place(0, 2), {}, 2.0, say=notes.append)
    assert len(notes) == 1 and "MASTER_ADDR has to be its address" in notes[0]


@pytest.mark.parametrize(
    ("came", "words"), [(True, "another process is this rank already"), (False, "has not seen all")]
)
def test_a_process_that_comes_when_all_have_met_is_told_so(
    monkeypatch: pytest.MonkeyPatch, came: bool, words: str
) -> None:
    monkeypatch.setattr(meeting, "VERDICT_S", 0.1)
    shared = dist.HashStore()
    call = {"word": "w", "launch": [None, None], "world_size": 2}
    shared.set(meeting.CALL, json.dumps(call))
    first = dist.PrefixStore("megatron_lpa/w", shared)
    if came:
        first.set("answer/1", "{}")
    first.set("verdict", json.dumps({"kind": "fine", "words": {"0": "a", "1": "b"}}))
    patience = meeting._Patience(0.3, lambda stage: None, lambda line: None)
    with pytest.raises(RankHang, match=words):
        meeting._answer(shared, place(1, 2), {"word": "late"}, patience)


def test_a_port_that_is_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(
            RankError, match="if another run uses this port, give the launcher another --master_port"
        ):
            meet(place(0, 2), {}, 60.0)


def listening() -> set[str]:
    return {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def served(address: str, port: int) -> set[str]:
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    before = listening()
    found = meeting._serve(place(0, 2), meeting._Patience(5.0, lambda stage: None, lambda line: None))
    now = listening()
    del found
    return now - before


def test_processes_of_one_machine_are_not_open_to_others(world: Any) -> None:
    """The store at which they meet can only be reached through the loopback."""
    (outside,) = world(1).run(served, "0.0.0.0", free_port())
    assert outside & {"::", "0.0.0.0"}, "the check would see a port that is open to all"
    (inside,) = world(1).run(served, "127.0.0.1", free_port())
    assert not inside & {"::", "0.0.0.0"}
    before = listening()
    assert meet(place(0, 1), {}, 1.0).connection() is None
    assert listening() == before


PROCESS = """
import os, psutil
from megatron_lpa.engine.joining import start_distributed
start_distributed(1)
print(sorted({c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}))
"""


def test_no_port_is_open_to_others_where_the_machines_name_leads_to_its_network(tmp_path: Path) -> None:
    """As on a cluster's node: gloo listens where the name leads to, if nobody says otherwise."""
    outside = next(
        (
            address.address
            for addresses in psutil.net_if_addrs().values()
            for address in addresses
            if address.family == socket.AF_INET and not address.address.startswith("127.")
        ),
        None,
    )
    renamed = ["unshare", "-mu", "bash", "-c"]
    setup = f"hostname a-node && mount --bind {tmp_path}/hosts /etc/hosts && "
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{outside} a-node\n")
    if (
        outside is None
        or not shutil.which("unshare")
        or subprocess.run([*renamed, f"{setup}true"], check=False).returncode
    ):
        pytest.skip("needs a network address, and the right to give a process another host name")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "GLOO_"))
    }
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

    def listened_to(**more: str) -> str:
        return subprocess.run(
            [*renamed, f'{setup}exec "{sys.executable}" -c "$0"', PROCESS],
            env=environment | more, capture_output=True, text=True, check=True, timeout=300,
        ).stdout.splitlines()[-1]  # fmt: skip

    assert listened_to() == "['127.0.0.1']"
    interface = next(n for n, a in psutil.net_if_addrs().items() if any(x.address == outside for x in a))
    assert outside in listened_to(GLOO_SOCKET_IFNAME=interface), "what a user sets is left alone"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
        ({"LOCAL_WORLD_SIZE": "8.5"}, "LOCAL_WORLD_SIZE is '8.5'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
        ({"LOCAL_RANK": "2", "LOCAL_SIZE": "2"}, "LOCAL_RANK=2 and LOCAL_WORLD_SIZE=2"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is empty"),
        ({"RANK": "", "WORLD_SIZE": "1"}, "RANK is empty"),
        ({"LOCAL_RANK": " "}, "LOCAL_RANK is empty"),
        ({"LOCAL_SIZE": ""}, "LOCAL_SIZE is empty"),
        ({"WORLD_SIZE": "1_0"}, "WORLD_SIZE is '1_0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
    ],
)
def test_a_launcher_s_variables_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert place_from_environment() == Place(0, 1, 0, 1, HOST)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        place_from_environment()


def test_a_process_alone_tells_its_own_errors() -> None:
    assert isinstance(alone := meet(place(0, 1), {"anything": 1}, 0.0), Meeting) and alone.told_by_first("x")


def test_kinds_of_errors_have_their_exit_codes() -> None:
    assert (
        RankError("x").exit_code == 1 and RankError("x", 78).exit_code == 78 and RankHang("x").exit_code == 75
    )
