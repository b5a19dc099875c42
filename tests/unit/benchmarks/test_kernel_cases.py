"""What is tuned, against what the presets' models ask the table for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import kernel_compile, kernel_layers, kernel_tune
from benchmarks.kernel_cases import Job, default_jobs
from benchmarks.kernel_layers import DECODE, PAPER, Shape, make_layer
from benchmarks.kernel_timing import Setting, Times
from benchmarks.step_config import run_config
from megatron_lpa.config import preset_names
from megatron_lpa.model.recompute import recompute_for
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.ops import products
from megatron_lpa.ops.dispatch import Case, Measured, Plan, nearest, parse_table
from megatron_lpa.parallel.groups import ParallelGroups

BF16 = Setting(torch.device("cpu"), torch.bfloat16, 1.0, False)
"""A CPU counts as capability 9.0 where tiles are listed."""

PRESETS = [name for name in preset_names() if name.endswith("/lpa") and name != "tiny/lpa"]
"""tiny is for the CPU."""


@pytest.fixture(scope="module")
def table() -> dict[Case, tuple[Measured, ...]]:
    """The default cases, as if joined products had won everywhere."""
    lines: list[dict[str, Any]] = []
    for job in default_jobs(BF16):
        plan = Plan("joined")
        lines.append(kernel_tune.line_of(BF16, job, plan, {plan: Times(1.0, 1.0)}, {}))
    return parse_table({"cases": lines}, Path("table.json"), (9, 0), "cpu")


def cases_of(preset: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Case, int]]:
    """What one layer of the preset's model asks for at its micro-batch, in bf16. Fake tensors take no
    memory."""
    asked: list[tuple[Case, int]] = []
    plan_of = products.plan_of

    def spy(path: str, case: Case, tokens: int, device: torch.device) -> Plan:
        asked.append((case._replace(dtype=torch.bfloat16), tokens))
        return plan_of(path, case, tokens, device)

    monkeypatch.setattr(products, "plan_of", spy)
    config = run_config(preset, {"model.num_layers": 1})
    with FakeTensorMode():
        decoder = Decoder(
            config.model, ParallelGroups.single(), config.parallel.lowdim_layout, recompute_for("none"), config.kernels  # noqa: E501
        )  # fmt: skip
        ids = torch.zeros(config.train.micro_batch_size, config.model.sequence_length + 1, dtype=torch.long)
        with torch.set_grad_enabled(training):
            decoder(ids[:, :-1], ids[:, 1:])
    yield from asked


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_find_their_cases(
    preset: str, training: bool, table: dict[Case, tuple[Measured, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the micro-batch, and at up to 64 times as many tokens without a gap."""
    asked = list(cases_of(preset, training, monkeypatch))
    assert [len(case.ranks) for case, _ in asked] == [3, 1]
    for case, tokens in asked:
        assert case.training == training and case in table, case
        for doublings in range(13):
            assert nearest(table[case], int(tokens * 2 ** (doublings / 2))).path == "joined", (
                case,
                doublings,
            )


def test_presets_are_those_of_the_paper() -> None:
    assert len(PRESETS) == 5


def test_the_goals_shapes_are_tuned_and_the_first_cases_are_training() -> None:
    jobs = default_jobs(BF16)
    assert len(jobs) == len(set(jobs))
    for shape in PAPER:
        assert {Job(shape, 3, False, True), Job(shape, 3, True, True), Job(shape, 1, False, True)} <= {*jobs}
    kinds = [(not job.training, job.shape in DECODE) for job in jobs]
    assert kinds == sorted(kinds) and kinds[-1] == (True, True)


@pytest.mark.parametrize(
    ("tokens", "small"), [(1, 1), (4, 4), (16, 16), (5120, 256), (98304, 256), (5000, 257)]
)
def test_small_sizes_that_compile_the_same_kernels(tokens: int, small: int) -> None:
    """Triton makes one kernel for the number 1, one for multiples of 16, one for other numbers."""
    assert kernel_compile.small_tokens(tokens) == small


def test_only_what_will_be_timed_is_compiled() -> None:
    decoding = [Job(Shape(tokens, 1024, 128), 1, False, False) for tokens in (1, 4, 16)]
    work = kernel_compile.work_of(BF16, decoding, tiles=2)
    assert [(job.shape.tokens, job.training) for _, job, _ in work] == [
        (n, False) for n in (1, 1, 4, 4, 16, 16)
    ]
    assert not any(plan.backward_tile for _, _, plan in work)
    # Widths and further tokens add nothing; the backward pass has kernels of its own, and forward one that
    # keeps latents.
    training = [
        Job(Shape(tokens, width, 128), 3, False, True) for tokens, width in ((5120, 768), (98304, 1024))
    ]
    work = kernel_compile.work_of(BF16, training, tiles=2)
    assert len(work) == 2 + len(kernel_compile.fitting(BF16, Shape(5120, 768, 128), 3, 2))
    assert all(job.training and job.shape.tokens == 256 for _, job, _ in work)


def test_tiles_with_few_rows_are_not_tried_for_many_tokens() -> None:
    assert kernel_compile.fitting(BF16, Shape(98304, 1024, 256), 3, 9) == []
    assert kernel_compile.fitting(BF16, Shape(16, 1024, 256), 1, 9)


@pytest.mark.parametrize("shape", DECODE)
def test_decoding_does_not_find_its_weights_in_the_cache(shape: Shape) -> None:
    """Several times the L2 cache of 50 to 60 MB lies between two uses of a weight."""
    with FakeTensorMode():
        layer = make_layer(shape, BF16)
    weights = [t for inputs in layer.sets for pair in inputs.pairs for t in (pair.w_a, pair.w_b)]
    assert len({id(t) for t in weights}) == len(layer.sets) * 8
    assert sum(t.numel() * t.element_size() for t in weights) > 200e6
    assert sum(inputs.dense[0].numel() * 8 for inputs in layer.sets) > 200e6


def test_training_sets_share_their_weights() -> None:
    with FakeTensorMode():
        layer = make_layer(kernel_layers.PAPER[0], BF16)
    assert len(layer.sets) >= 2 and all(s.pairs is layer.sets[0].pairs for s in layer.sets)
