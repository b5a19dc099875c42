"""Compiles the kernels that the tuner will time, in several processes, into Triton's cache on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any

import torch

from benchmarks import kernel_layers
from benchmarks.kernel_cases import Job
from benchmarks.kernel_timing import Setting
from megatron_lpa.kernels.tiles import FEW_TOKENS, Tile, candidates, why_not
from megatron_lpa.ops.dispatch import LEAST_ROWS, Plan

SMALL_TOKENS = 256
"""Enough to compile for; a multiple of 16."""

Work = tuple[Setting, Job, Plan]


def fitting(
    setting: Setting, shape: kernel_layers.Shape, latents: int, count: int, rotary: bool = False
) -> list[str]:
    """The first candidates that fit the device and can win.

    Args:
        setting: device and dtype.
        shape: tokens and rank decide.
        latents: 1 forward, the number of pairs for the gradient of x.
        count: at most so many.
        rotary: whether outputs are rotated.
    """
    capability = torch.cuda.get_device_capability() if setting.device.type == "cuda" else (9, 0)
    size = setting.dtype.itemsize

    def fits(tile: Tile) -> bool:
        if shape.tokens > FEW_TOKENS and tile.block_m < LEAST_ROWS:
            return False
        return why_not(tile, shape.rank, latents, size, capability, rotary) is None

    return [str(tile) for tile in candidates(shape.tokens) if fits(tile)][: 1 if setting.dry else count]


def small_tokens(tokens: int) -> int:
    """So few tokens that Triton makes the same kernel for them: it makes one for 1, one for multiples of 16,
    one for all others. Positions of the rotary embedding are an argument, too."""
    if tokens <= SMALL_TOKENS:
        return tokens
    return SMALL_TOKENS if math.gcd(tokens, kernel_layers.SEQUENCE) % 16 == 0 else SMALL_TOKENS + 1


def work_of(setting: Setting, jobs: Sequence[Job], tiles: int) -> list[Work]:
    """Each kernel once, in the order of the jobs.

    A kernel is compiled for a rank, a form and tiles, not for widths (all are multiples of every block of
    columns). Only what will be timed: without a backward pass there are no latents to keep, which is a
    kernel of its own.
    """
    found: dict[tuple[Any, ...], Work] = {}
    for job in jobs:
        shape = job.shape
        small = job._replace(shape=kernel_layers.Shape(small_tokens(shape.tokens), shape.width, shape.rank))
        alignment = min(16, math.gcd(shape.tokens, 16))
        kind = (shape.rank, job.pairs, job.norm, job.training, alignment, shape.tokens == 1)
        plans = [Plan("fused", text) for text in fitting(setting, shape, 1, tiles, job.norm)]
        if job.training:
            plans += [Plan("fused", "", text) for text in fitting(setting, shape, job.pairs, tiles)]
        for plan in plans:
            found.setdefault((*kind, plan), (setting, small, plan))
    return list(found.values())


def compile_ahead(
    setting: Setting, jobs: Sequence[Job], tiles: int, workers: int, limit_s: float
) -> dict[str, int]:
    """Compiles in the order of the jobs, and meanwhile the norms and rotations in this process.

    One kernel after the other would take most of a tuning run: about three seconds each.

    Args:
        setting: device and dtype.
        jobs: what will be tuned.
        tiles: candidates per kernel.
        workers: processes; 0 compiles in this one.
        limit_s: no kernel is begun after this.

    Returns:
        how many kernels were asked for, and how many were done in time.
    """
    end = time.monotonic() + limit_s
    work = work_of(setting, jobs, tiles)
    if workers == 0:
        for item in work:
            compile_one(item)
        return {"kernels": len(work), "done": len(work)}
    # Spawned, because a forked process cannot use the GPU of its parent.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(compile_one, item) for item in work]
        try:
            compile_elementwise(setting, jobs)
            wait(futures, timeout=max(0.0, end - time.monotonic()))
        finally:  # also where a signal ends all: those that have begun are waited for
            pool.shutdown(wait=False, cancel_futures=True)
    done = sum(not future.cancelled() and future.exception() is None for future in futures)
    return {"kernels": len(work), "done": done}


def compile_one(work: Work, elementwise: str = "eager") -> None:
    """Runs one plan once. What fails here fails again when it is measured, and is recorded there.

    Args:
        work: setting, job at few tokens, plan.
        elementwise: norms and rotations that are no part of the kernel. By default not compiled: every
            process would spend ten seconds on them.
    """
    setting, job, plan = work
    with contextlib.suppress(Exception), torch.set_grad_enabled(job.training):
        layer = kernel_layers.make_layer(
            job.shape, dataclasses.replace(setting, dry=True)
        )  # one set of inputs
        inputs = layer.sets[0]
        chosen = inputs.pairs[: job.pairs]
        z = kernel_layers.project_by_plan(plan, inputs.x, chosen, layer.around(job.norm), elementwise)
        if job.training:
            torch.autograd.grad(z, [inputs.x], inputs.upstream[: job.pairs])


def compile_elementwise(setting: Setting, jobs: Sequence[Job]) -> None:
    """Norms and rotations as models compile them, once per width, in this process."""
    widths = {job.shape.width: job for job in reversed(jobs) if job.norm and job.training}
    for job in widths.values():
        small = job._replace(shape=kernel_layers.Shape(SMALL_TOKENS, job.shape.width, job.shape.rank))
        compile_one((setting, small, Plan("eager")), "auto")
