"""The choice of a path: by table, by force, and what is refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lpa import files
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.ops import dispatch
from megatron_lpa.ops.dispatch import (
    EAGER,
    Case,
    Plan,
    choose,
    nearest,
    parse_table,
    read_table,
    why_no_interpreter,
)

CASE = Case(torch.bfloat16, 1024, (128,) * 3, (1024,) * 3, False, True)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FUSED = ("fused", "128,64,64,8,3,1", "128,64,64,8,3,1")


def line(**changes: Any) -> dict[str, Any]:
    return {
        "dtype": "bfloat16", "d_in": 1024, "ranks": [128] * 3, "widths": [1024] * 3, "norm": False,
        "device": "H200", "training": True, "tokens": 16384,
        "path": "fused", "forward_tile": FUSED[1], "backward_tile": FUSED[2],
    } | changes  # fmt: skip


@pytest.fixture
def gpu_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A GPU of compute capability 9.0 whose table has two measured cases."""
    cases = [line(), line(tokens=64, path="joined", forward_tile="", backward_tile="")]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H200")
    monkeypatch.setattr(dispatch, "TUNING_FOLDER", tmp_path)
    (tmp_path / "sm_90.json").write_text(json.dumps({"cases": cases}))
    monkeypatch.setattr(dispatch, "read_table", dispatch.read_table.__wrapped__)  # not cached
    monkeypatch.setattr(dispatch, "why_not_fused", lambda case, device_type: None)


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_the_cpu_takes_the_eager_path() -> None:
    assert choose("auto", CASE, 10**6, CPU) == EAGER


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_shipped_tables_parse_and_say_whether_they_are_measured(capability: tuple[int, int]) -> None:
    content = json.loads(dispatch.table_path(capability).read_text())
    table = read_table(capability, "any")
    assert content["device"] == f"sm_{capability[0]}{capability[1]}"
    assert (content["status"] == "not measured") == (not table) == (content["machine"] is None)


def test_a_device_without_a_table() -> None:
    assert read_table((7, 5), "any") == {}


@pytest.mark.usefixtures("gpu_table")
def test_the_table_decides() -> None:
    assert choose("auto", CASE, 16384, GPU) == Plan(*FUSED)
    assert choose("auto", CASE, 10**6, GPU) == Plan(*FUSED)
    assert choose("auto", CASE, 64, GPU) == Plan("joined")


@pytest.mark.usefixtures("gpu_table")
def test_without_a_measured_case_joined_products_train_and_the_plain_path_decodes() -> None:
    for case in (CASE._replace(d_in=768), CASE._replace(dtype=torch.float16), CASE._replace(norm=True)):
        assert choose("auto", case, 16384, GPU) == Plan("joined")
        assert choose("auto", case, 1535, GPU) == EAGER  # 4 tokens for each of 3 x 128
        assert choose("auto", case._replace(training=False), 16384, GPU) == EAGER
        assert choose("auto", case._replace(ranks=(128,), widths=(1024,)), 16384, GPU) == EAGER
    # Measured at 64 and 16,384 tokens: nothing is near 2,000.
    assert choose("auto", CASE, 2000, GPU) == Plan("joined")
    assert choose("auto", CASE, 1000, GPU) == EAGER


@pytest.mark.parametrize(
    ("tokens", "path"),
    [(0, None), (15, None), (16, "joined"), (256, "joined"), (257, None), (1023, None), (1025, None),
     (4095, None), (4096, "fused"), (10**7, "fused")],
)  # fmt: skip
def test_a_case_counts_for_near_numbers_of_tokens_only(tokens: int, path: str | None) -> None:
    measured = ((64, ("joined", "", "")), (16384, FUSED))
    plan = nearest(measured, tokens)
    assert (plan and plan.path) == path


def test_what_was_measured_for_few_tokens_only_says_nothing_about_many() -> None:
    measured = ((16, FUSED),)
    assert [nearest(measured, tokens) for tokens in (64, 65, 10**5)] == [Plan(*FUSED), None, None]


def test_between_two_measured_cases_the_nearer_counts() -> None:
    measured = ((1000, ("joined", "", "")), (4000, FUSED))
    assert [nearest(measured, tokens) for tokens in (1999, 2001)] == [Plan("joined"), Plan(*FUSED)]


@pytest.mark.usefixtures("gpu_table")
def test_force_goes_before_the_table() -> None:
    assert choose("joined", CASE, 16384, GPU) == Plan("joined")
    assert choose("fused", CASE, 16384, GPU) == Plan(*FUSED)
    forced = choose("fused", CASE, 64, GPU)  # measured as joined there: default tiles, split for few tokens
    assert forced.path == "fused" and forced.forward_tile.startswith("16,")


def test_a_path_that_does_not_exist() -> None:
    with pytest.raises(UserError, match="the low-dimensional path is 'fast'; give one of auto, eager"):
        choose("fast", CASE, 1, CPU)


@pytest.mark.parametrize(
    ("case", "device", "reason"),
    [
        (CASE, CPU, "x is on cpu"),
        (CASE._replace(dtype=torch.float64), GPU, "float64 is not one"),
        (CASE._replace(ranks=(128,) * 4, widths=(1024,) * 4), GPU, "4 pairs are more than 3"),
        (CASE._replace(ranks=(128, 64, 64)), GPU, r"ranks \(128, 64, 64\) differ"),
        (CASE._replace(ranks=(513,), widths=(64,)), GPU, "no tile fits the device at r = 513"),
    ],
)
def test_forcing_what_cannot_run(
    case: Case, device: torch.device, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H200")
    with pytest.raises(UserError, match=f"'fused' cannot run: .*{reason}.*use 'auto'"):
        choose("fused", case, 100, device)


def test_the_choice_without_a_table_is_compiled_into_one_graph() -> None:
    """The number of tokens is left open; where it is compared, the graph gets a guard."""

    def factor(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if dispatch.planned((), CASE, x.shape[0]).path == "joined" else 3)

    compiled = torch.compile(factor, fullgraph=True, dynamic=True, backend="eager")
    for tokens, expected in ((1535, 3), (1536, 2), (4000, 2), (7, 3)):
        assert torch.equal(compiled(torch.ones(tokens, 1)), torch.full((tokens, 1), float(expected)))


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((9, 0), True)])
def test_forcing_a_rank_whose_tiles_are_too_small_for_many_tokens(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At r = 512 an A800 has room for 32 rows: every 32 tokens would read both factors again."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "some GPU")
    case = CASE._replace(d_in=4096, ranks=(512,) * 3, widths=(4096,) * 3)
    assert choose("fused", case, 16, GPU).path == "fused"
    if runs:
        plan = choose("fused", case, 4096, GPU)
        assert plan.forward_tile.startswith("64,") and not plan.backward_tile
    else:
        with pytest.raises(UserError, match=r"no tile of 64 rows or more.*r = 512;.*use 'auto'"):
            choose("fused", case, 4096, GPU)


def test_an_interpreter_that_does_not_work_with_this_numpy() -> None:
    assert why_no_interpreter("3.7.1", "2.5.2") is None
    assert why_no_interpreter("3.6.0", "2.3.5") is None
    for numpy_version in ("2.4.0rc1", "2.10.1", "3.0.0"):
        assert "install numpy<2.4, or Triton 3.7" in str(why_no_interpreter("3.6.0", numpy_version))


def test_forcing_the_kernel_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="Triton is not installed"):
        choose("fused", CASE, 100, CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "auto"}, "case 1: the path is 'auto'"),
        ({"forward_tile": "256,64,256,8,4,1"}, "tile 256,64,256,8,4,1 cannot run: "),
        ({"path": "joined"}, "tiles go with the path 'fused'"),
        ({"forward_tile": "", "backward_tile": ""}, "tiles go with the path 'fused'"),
    ],
)
def test_tables_that_cannot_be_right(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_table({"cases": [line(**changes)]}, Path("table.json"), (9, 0), "H200")


def test_a_table_of_an_earlier_version_is_read() -> None:
    earlier = line(path="merged", forward_tile="", backward_tile="")
    ((measured,),) = parse_table({"cases": [earlier]}, Path("table.json"), (9, 0), "H200").values()
    assert measured[1] == ("eager", "", "")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"{}", b"null", b'{"cases": 7}', b'{"cases": {}}',
        *(json.dumps({"cases": [line(), case]}).encode() for case in (
            7, None, [], {}, line(dtype="sum"), line(dtype="x\ny"), line(dtype="x" * 10**6), line(dtype=None),
            line(ranks=[]), line(ranks=7), line(ranks=["x"]), line(widths=[[]]), line(widths=[0]),
            line(d_in="x"), line(tokens=None), line(tokens=True), line(norm="x"), line(training=1),
            line(rotary=[]), line(forward_tile="1,2"), line(forward_tile=[1]),
            line(forward_tile="0,0,0,0,0,0"), line(path=[]), line(path="x" * 10**6),
        )),
    ],
    ids=lambda content: content[-40:].decode(errors="replace"),
)  # fmt: skip
@pytest.mark.usefixtures("gpu_table")
def test_a_table_that_is_none_is_said_in_one_line(content: bytes) -> None:
    path = dispatch.table_path((9, 0))
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        choose("auto", CASE, 16384, GPU)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 300 + len(str(path))
    assert caught.value.exit_code == 78


@pytest.mark.usefixtures("gpu_table")
def test_a_table_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSES_S", (0.0,))
    for call in ("stat", "open"):
        real, failures = getattr(os, call), [errno.ESTALE]

        def failing(
            path: Any, *more: Any, real: Any = real, failures: list[int] = failures, **named: Any
        ) -> Any:
            if failures and str(path).endswith("sm_90.json"):
                raise OSError(failures.pop(), "Stale file handle")
            return real(path, *more, **named)

        monkeypatch.setattr(files.os, call, failing)
        assert choose("auto", CASE, 16384, GPU) == Plan(*FUSED)
        assert not failures
        failures += [errno.ESTALE] * 2
        with pytest.raises(TryAgain, match=r"sm_90\.json: cannot be read"):
            choose("auto", CASE, 16384, GPU)


@pytest.mark.usefixtures("gpu_table")
def test_a_table_is_a_regular_file() -> None:
    path = dispatch.table_path((9, 0))
    path.unlink()
    os.mkfifo(path)
    assert choose("auto", CASE, 16384, GPU) == Plan("joined")


def test_lines_of_the_same_device_go_before_others_of_its_capability() -> None:
    joined = {"path": "joined", "forward_tile": "", "backward_tile": ""}
    cases = [
        line(device="H100", **joined),
        line(),
        line(device="H100", tokens=1024),
        line(device="H100", d_in=768),
    ]

    def lines_for(device: str, d_in: int = 1024) -> list[tuple[int, str]]:
        table = parse_table({"cases": cases}, Path("table.json"), (9, 0), device)
        return [(tokens, plan[0]) for tokens, plan in table[CASE._replace(d_in=d_in)]]

    assert lines_for("H200") == [
        (16384, "fused")
    ]  # not the line for 1024 tokens either: one card's crossover
    assert lines_for("H100") == [(1024, "fused"), (16384, "joined")]
    assert lines_for("H200", 768) == [(16384, "fused")]  # measured on the other card only
    assert len(lines_for("H20")) == 3
