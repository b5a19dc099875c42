"""``tools/benchmark.py train-step``, ``evaluate-step`` and ``profile`` at tiny sizes; no test looks at a
time."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import forked
from torch import nn

from benchmarks import official_code, step_runs
from benchmarks.step_config import Contender
from benchmarks.step_loops import Loop, MasterAdamW, build_loop
from benchmarks.step_runs import run_in_process
from benchmarks.step_timing import failure
from megatron_lpa.config import OptimConfig

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="sizes and precision are a CPU's")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_tool", ROOT / "tools" / "benchmark.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_step_of_every_loop(tmp_path: Path) -> None:
    """In a process of its own: DeepSpeed stays in a process that has started it."""
    output = tmp_path / "result.json"
    done = forked.run([ROOT / "tools" / "benchmark.py", "train-step", "--dry-run", "--output", output], ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    records = {(r["preset"], r["loop"]): r for r in result["contenders"]}
    variants = ("transformer", "same_param", "lpa")
    assert set(records) == {(f"tiny/{v}", loop) for v in variants for loop in ("bare", "engine")} | {
        ("tiny/transformer", "llama")
    }
    for r in records.values():
        assert "error" not in r, r
        assert r["tokens_per_step"] == 16 and r["layers"] == 1 and r["layers_changed"]
        assert r["tokens_per_second"] == pytest.approx(16e3 / r["step_ms"]["median"])
        assert r["model_flops_per_second"] == pytest.approx(r["tokens_per_second"] * r["flops_per_token"])
        assert r["mfu"] is None and r["kernels"]["lowdim"] == "auto"
    # lpa and same_param save against transformer in two loops; engine against bare three times; llama once.
    assert len(result["comparisons"]) == 4 + 3 + 1
    assert result["one_process"] and result["machine"]["cores"] and result["versions"]["deepspeed"]
    assert "tiny/lpa engine" in done.stdout and "FLOPs allow" in done.stdout


def test_train_step_in_processes_of_their_own(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    words = (
        "train-step --preset tiny --models transformer lpa --loops bare --micro-batch 1 --steps 2 --warm-up 1"
    )
    words += " --precision fp32 --layers 1 --sequence 8 --set kernels.lowdim=joined"
    assert benchmark.main([*words.split(), "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    for r in result["contenders"]:
        assert r["steps"] == 2 and len(r["round_medians_ms"]) == 2, r
        assert r["peak_memory_bytes"] > 50e6 and r["kernels"]["lowdim"] == "joined"
        assert set(r["plans"].values()) == ({"joined"} if r["preset"] == "tiny/lpa" else set())
    (line,) = result["comparisons"]
    assert 0 < line["limit"] < 1 and line["memory_ratio"] > 0
    assert "tiny/lpa bare, round 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train-step --steps 0", "--steps is 0; give 1 or more"),
        ("train-step --steps 1", "--rounds is 2; give --steps at least as many"),
        ("train-step --preset nothing", "unknown preset 'nothing/transformer'"),
        ("train-step --set kernels.lowdim=best", "expected one of auto"),
        ("train-step --models lpa --loops llama", "run the transformer only"),
        ("train-step --models lpa --loops llama_plain", "run the transformer only"),
        ("train-step --clock cpu", "add --one-process"),
        ("train-step --loops official --preset s2_small", "git clone"),
        ("loss --repeats 0", "--repeats is 0; give 1 or more"),
        ("evaluate-step --models nothing", "unknown preset 'nothing'"),
        ("evaluate-step --tokens 0", "--tokens is 0; give 1 or more"),
        ("profile --steps 0", "--steps is 0; give 1 or more"),
        ("one-process --micro-batches 2 0", "give 1 or more"),
        ("one-process --precision bf16", "the engine refuses bf16 there; name the others"),
    ],
)
def test_refusals(
    benchmark: ModuleType,
    words: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(official_code, "FOLDER", tmp_path)
    assert benchmark.main(words.split()) == 78
    assert message in capsys.readouterr().err


def test_one_process_compares_both_loops_at_each_stage(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    words = ["one-process", "--dry-run", "--stages", "zero0", "zero3", "--output", str(output)]
    # A process of its own: the engine joins a world, which stays.
    forked.run([ROOT / "tools" / "benchmark.py", *words], tmp_path).check_returncode()
    result = json.loads(output.read_text())
    assert [line["deepspeed_config"] for line in result["comparisons"]] == ["zero0", "zero3"]
    for line in result["comparisons"]:
        medians = [statistics.median(line["all_steps_ms"][name]) for name in ("engine", "bare")]
        assert line["ratio"] == pytest.approx(medians[0] / medians[1], rel=1e-3)
        assert line["cpu_ratio"] > 0 and line["steps"] == 2


def test_the_whole_loop_is_timed_beside_a_bare_one(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    words = "--steps 5 --model.num_layers 1 --model.sequence_length 16 --train.global_batch_size 2"
    words += f" --train.micro_batch_size 1 --output {output}"
    forked.run([ROOT / "benchmarks" / "loop_overhead.py", *words.split()], ROOT).check_returncode()
    result = json.loads(output.read_text())
    ratio = result["step_ms_ours"] / result["step_ms_bare"]
    assert result["overhead_percent"] == pytest.approx(100 * (ratio - 1)) and result["steps_measured"] == 5


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_loss(benchmark: ModuleType, clock: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    words = f"loss --tokens 5 --ids 11 --repeats 2 --clock {clock} --output {output}"
    assert benchmark.main(words.split()) == 0
    result = json.loads(output.read_text())
    assert (result["tokens"], result["ids"], result["clock"]) == (5, 11, clock)
    assert [case["precision"] for case in result["cases"]] == ["fp32", "bf16"]
    for case in result["cases"]:
        assert case["ratio"] == pytest.approx(case["ours_ms"]["median"] / case["torch_ms"]["median"])
    assert "bf16: ours" in capsys.readouterr().out


def test_evaluate_step(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert benchmark.main(["evaluate-step", "--dry-run", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    dense, lpa = result["models"]
    assert (dense["preset"], lpa["preset"]) == ("tiny/transformer", "tiny/lpa")
    for r in (dense, lpa):
        assert r["tokens_per_step"] == 32 and r["weight_bytes"] == 4 * r["parameters"]
        assert r["tokens_per_second"] == pytest.approx(32e3 / r["step_ms"]["median"])
    (line,) = result["comparisons"]
    assert line["time"] == pytest.approx(1 - lpa["step_ms"]["median"] / dense["step_ms"]["median"])
    assert "tiny/lpa saves" in capsys.readouterr().out


def test_profile(benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, path = tmp_path / "result.json", tmp_path / "trace.json.gz"
    words = ["profile", "--dry-run", "--steps", "2", "--loops", "bare", "engine"]
    # Without offload one process needs no DeepSpeed.
    words += ["--set", "train.deepspeed_config=zero3_offload"]
    assert benchmark.main([*words, "--trace", str(path), "--output", str(output)]) == 0
    profiles = json.loads(output.read_text())["profiles"]
    assert list(profiles) == ["bare", "engine"]
    zero = {"ZeRO-3 parameter gather", "ZeRO-3 gradient reduction", "optimizer"}
    assert zero <= set(profiles["engine"]["profile"]["categories_ms"])
    assert profiles["engine"]["plans"]["3 pairs, d 128, r 32, training"] == "eager"  # on a CPU
    figures = profiles["bare"]["profile"]
    assert (tmp_path / "bare_trace.json.gz").stat().st_size > 1000
    assert figures["steps"] == 2 and not figures["on_gpu"]
    assert {"matrix products", "attention", "optimizer", "elementwise"} <= set(figures["categories_ms"])
    assert sum(figures["categories_ms"].values()) + figures["idle_ms"] == pytest.approx(figures["step_ms"], rel=0.05)  # fmt: skip  # noqa: E501
    assert "idle gaps" in capsys.readouterr().out


def test_failures_are_recorded() -> None:
    contender = Contender("tiny/lpa", "llama", 1, precision="fp32")
    result = run_in_process(contender, 1, 1, None)
    assert "dense models only" in result["error"]
    assert "stopped after" in run_in_process(contender, 1, 1, 0.01)["error"]
    assert failure(ModuleNotFoundError("no", name="deepspeed"))["missing_package"] == "deepspeed"
    assert failure(torch.cuda.OutOfMemoryError("3 GiB"))["out_of_memory"] is True


def test_masters_are_updated_in_fp32() -> None:
    """Against PyTorch's AdamW on fp32 copies, gradients of two micro-batches summed by hand."""
    optim = OptimConfig(lr=0.1, eps=1e-8, weight_decay=0.01, grad_clip=0.5)
    torch.manual_seed(0)
    model = nn.Linear(8, 4).bfloat16()
    inputs = [torch.randn(3, 8).bfloat16() for _ in range(2)]
    copies = [p.detach().float() for p in model.parameters()]
    reference = torch.optim.AdamW(
        copies, lr=0.1, betas=(optim.beta1, optim.beta2), eps=1e-8, weight_decay=0.01
    )
    ours = MasterAdamW(model.parameters(), optim)
    for _ in range(3):
        parts = [torch.autograd.grad(model(x).square().sum(), list(model.parameters())) for x in inputs]
        for copy, first, second in zip(copies, *parts, strict=True):
            copy.grad = first.float() + second.float()
        torch.nn.utils.clip_grad_norm_(copies, 0.5)
        reference.step()
        for x in inputs:
            model(x).square().sum().backward()
        assert all(p.grad is None for p in model.parameters())
        ours.step()
        for master, copy, parameter in zip(ours.masters, copies, model.parameters(), strict=True):
            torch.testing.assert_close(master, copy)
            assert torch.equal(parameter, master.bfloat16())


ENGINE_AGAINST_BARE = """
import torch
from benchmarks.step_config import Contender
from benchmarks.step_loops import build_loop
losses = []
for loop in ("engine", "bare"):
    torch.manual_seed(0)
    contender = Contender("tiny/lpa", loop, 1, accumulate=2, precision=PRECISION, layers=1, sequence=16)
    step = build_loop(contender, torch.device("cpu")).step
    losses.append([float(step()) for _ in range(5)])
print(losses[0]); print(losses[1])
assert abs(losses[0][0] - losses[0][4]) > 0.01, "it has to learn"
torch.testing.assert_close(*map(torch.tensor, losses), rtol=TOLERANCE, atol=0)
"""


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-3)])
def test_engine_and_bare_loop_do_the_same(precision: str, tolerance: float) -> None:
    code = ENGINE_AGAINST_BARE.replace("PRECISION", repr(precision)).replace("TOLERANCE", str(tolerance))
    done = forked.run(["-c", code], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("loop", ["llama", "llama_plain"])
def test_llama_learns_too(loop: str) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    contender = Contender("tiny/transformer", loop, 2, precision="fp32", layers=1, sequence=16, dry=True)
    step = build_loop(contender, CPU).step
    losses = [float(step()) for _ in range(9)]
    assert losses[8] < losses[0]  # the same batch twice, 8 steps apart


@pytest.mark.parametrize(("loss", "skipped"), [(float("nan"), 0), (2.0, 1)])
def test_steps_that_are_not_training_are_no_figures(
    loss: float, skipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    contender = Contender("tiny/lpa", "bare", 1, precision="fp32", layers=1, sequence=16, dry=True)
    played = Loop(contender.config(), lambda: torch.tensor(loss), 1, lambda: skipped)
    monkeypatch.setattr(step_runs, "build_loop", lambda *_: played)
    result = step_runs.run_alone(contender, 1, 2)
    assert "not steps of training" in result["error"] and "rounds_ms" not in result
    played.step, played.skipped_steps = lambda: torch.tensor(2.0), lambda: 0
    assert step_runs.run_alone(contender, 1, 2)["loss_after"] == 2.0
