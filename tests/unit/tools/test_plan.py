"""``tools/plan.py`` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lpa.commands import plan

TOOL = Path(__file__).parents[3] / "tools" / "plan.py"


def numbers_of(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    assert plan.main([*argv, "--json"]) == 0
    numbers: dict[str, object] = json.loads(capsys.readouterr().out)
    return numbers


def test_json_from_a_shell_without_loading_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:];\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0 and 'torch' not in sys.modules"
    )
    argv = ["--preset", "3b/lpa", "--json", "--gpus", "16", "--tensor-parallel-size", "8"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(TOOL), *argv], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    numbers = json.loads(done.stdout)
    assert numbers["parameters"] == 2_427_092_224
    parts = ("embedding", "attention", "ffn", "norm", "head")
    assert sum(numbers[f"parameters_{part}"] for part in parts) == numbers["parameters"]
    assert numbers["flops_per_token_training"] == 3 * numbers["flops_per_token_forward"]
    states = ("parameters", "gradients", "optimizer_state", "activations")
    assert numbers["bytes_total_per_gpu"] == sum(numbers[f"bytes_{state}_per_gpu"] for state in states)
    # 2r for o and 3r for q, k, v; the dense FFN's all-reduce.
    assert numbers["collective_elements_per_token_per_layer_forward"] == 5 * 512 + 2 * 4096
    assert numbers["collective_elements_factor"] == 7 / 8
    layout = ("world_size", "tensor_parallel_size", "data_parallel_size", "zero_stage", "precision")
    assert [numbers[key] for key in layout] == [16, 8, 2, 3, "bf16"]


def test_own_options_and_dotted_overrides_both_count(capsys: pytest.CaptureFixture[str]) -> None:
    base = numbers_of(capsys, "--preset", "s1_small/lpa")
    assert base["zero_stage"] == 1  # the preset's deepspeed_config
    half = numbers_of(capsys, "--preset", "s1_small/lpa", "--micro-batch-size", "5")
    activations = [numbers["bytes_activations_per_gpu"] for numbers in (half, base)]
    assert 0.5 <= activations[0] / activations[1] < 0.6  # type: ignore[operator] # a chunk of the loss stays
    same = numbers_of(capsys, "--preset", "s1_small/lpa", "--train.micro_batch_size=5")
    assert same == half
    stage_3 = numbers_of(capsys, "--preset", "s1_small/lpa", "--gpus", "2", "--zero-stage", "3")
    assert stage_3["bytes_parameters_per_gpu"] == base["parameters"]  # two bytes each, over two GPUs
    offload = numbers_of(capsys, "--preset", "s1_small/lpa", "--train.deepspeed_config=zero3_offload")
    assert offload["bytes_optimizer_state_per_gpu"] == 0
    assert offload["bytes_optimizer_state_host_per_gpu"] == 12 * base["parameters"]  # type: ignore[operator]


def test_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--preset", "3b/transformer"]) == 0
    out = capsys.readouterr().out
    assert "(3232.6M)" in out and "(6.70 GFLOP)" in out and "GiB" in out


def test_a_rank_too_large_is_a_warning_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--preset", "s1_small/lpa", "--model.projections.q.rank", "400"]) == 0
    assert "warning: model.projections.q.rank is 400" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--preset", "3b/lap"], "did you mean 3b/lpa"),
        (["--preset", "3b/lpa", "--gpus", "12"], "set it to 48 or 96"),
        (["--preset", "3b/lpa", "--gpus", "0"], "world size is 0"),
        (["--preset", "3b/lpa", "--gpu", "8"], "--gpu"),
        (["--preset", "3b/lpa", "--train.deepspeed_config", "my.json"], "--zero-stage"),
        ([], "exactly one of train.steps"),
    ],
)
def test_what_the_user_can_mend_exits_with_78(
    capsys: pytest.CaptureFixture[str], argv: list[str], expected: str
) -> None:
    assert plan.main(argv) == 78
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and expected in err


def test_misuse_of_the_tool_exits_with_2() -> None:
    with pytest.raises(SystemExit) as end:
        plan.main(["--preset", "3b/lpa", "--zero-stage", "5"])
    assert end.value.code == 2
