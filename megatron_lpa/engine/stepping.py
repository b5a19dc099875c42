"""A step of training: what turns micro-batches into losses and losses into an optimizer step.

That is DeepSpeed, or plain PyTorch where one process holds each part of the model.

ZeRO divides state over data-parallel replicas. With one replica there is nothing to divide, at any stage, but
DeepSpeed's flat buffers and copies would be paid for in every step; ``OneReplica`` does the same arithmetic
without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

from megatron_lpa.config import RunConfig
from megatron_lpa.model.init import named_parameters_once
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.rng import seed_dropout
from megatron_lpa.parallel.sharding import spec_of

OptimizerOf = Callable[[Callable[[nn.Parameter], torch.Tensor]], torch.optim.Optimizer]
"""Builds the optimizer; takes what it steps on in place of each parameter."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step computed.

    Args:
        loss: mean loss of this rank's micro-batches, 0-d fp32, on the device.
        grad_norm: global gradient norm before clipping; a tensor stays on the device until someone reads it.
    """

    loss: torch.Tensor
    grad_norm: float | torch.Tensor


class Stepper(Protocol):
    """A module and its optimizer.

    Attributes:
        optimizer: PyTorch's, or DeepSpeed's around it.
        skipped_steps: steps that changed nothing because the gradient's global norm was not finite.
    """

    optimizer: Any
    skipped_steps: int

    def __call__(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Losses (B, S)."""
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch's mean loss; ``last`` of a step's."""
        ...

    def update(self) -> float | torch.Tensor:
        """Clip and step; the global norm before clipping."""
        ...

    def set_progress(self, step: int, samples: int) -> None:
        """Optimizer steps and samples so far, after a checkpoint was loaded."""
        ...

    def destroy(self) -> None:
        """Let go of hooks and memory."""
        ...


class OneReplica:
    """The step of a model of which this process holds one whole tensor-parallel part.

    Below fp32, fp32 master weights are stepped on and rounded into the parameters; a micro-batch's gradient
    is added to its fp32 sum, and freed, as soon as the backward pass has finished it. Masters start from the
    rounded values. DeepSpeed does the same at the stages 1 to 3, but for bf16 at stage 1, where it rounds the
    sum to bf16 to send it.

    Args:
        module: the decoder, in fp32.
        dtype: of the parameters that compute.
        optimizer_of: builds AdamW.
        groups: process groups, with one data-parallel rank.
        micro_steps: micro-batches per step.
        clip: largest global norm; 0 turns clipping off.

    Attributes:
        master_of: what AdamW steps on for each parameter: fp32, the parameter itself where that is fp32.
    """

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        optimizer_of: OptimizerOf,
        groups: ParallelGroups,
        micro_steps: int,
        clip: float,
    ) -> None:
        self.module = module.to(dtype)
        self.groups, self.micro_steps, self.clip = groups, micro_steps, clip
        self.skipped_steps = 0
        self.parameters = list(module.parameters())
        self.masters: list[torch.Tensor] = list(self.parameters)
        self._hooks: list[Any] = []
        if dtype != torch.float32:
            self.masters = [p.detach().float() for p in self.parameters]
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                take = _GradientTaker(master)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(take))
        self.master_of: dict[torch.Tensor, torch.Tensor] = dict(
            zip(self.parameters, self.masters, strict=True)
        )
        self.optimizer = optimizer_of(self.master_of.__getitem__)

    def __call__(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Losses (B, S)."""
        losses: torch.Tensor = self.module(tokens, labels)
        return losses

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch's mean loss."""
        (loss / self.micro_steps if self.micro_steps > 1 else loss).backward()

    def update(self) -> torch.Tensor:
        """Clip and step; the global norm before clipping, 0-d fp64 on the device."""
        for master in self.masters:
            if master.grad is None:  # of a parameter that took no part: zero, as DeepSpeed has it
                master.grad = torch.zeros_like(master)
        norm = gradient_norm(self.parameters, self.masters, self.groups)
        value = float(norm)  # waits, once a step, as DeepSpeed does
        if math.isfinite(value):
            clips = 0 < self.clip < value + 1e-6
            # PyTorch's fused AdamW divides gradients by this on its way, where clipping by itself would read
            # and write all of them once more.
            scale = ((norm + 1e-6) / self.clip).float() if clips else None
            self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
            self.optimizer.step()
            self.follow_masters()
        else:
            self.skipped_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def follow_masters(self) -> None:
        """Round the masters into the parameters."""
        if self._hooks:
            with torch.no_grad():
                torch._foreach_copy_([*self.parameters], self.masters)

    def set_progress(self, step: int, samples: int) -> None:
        """Nothing here counts them."""

    def destroy(self) -> None:
        """Let go of the hooks on the parameters."""
        for hook in self._hooks:
            hook.remove()


class _GradientTaker:
    """Moves a gradient into a master's fp32 sum."""

    def __init__(self, master: torch.Tensor) -> None:
        self.master = master

    def __call__(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if self.master.grad is None:
            self.master.grad = gradient.float()
        else:
            self.master.grad.add_(gradient)
        parameter.grad = None


class DeepSpeedStep:
    """DeepSpeed's engine around a module.

    Args:
        ds: DeepSpeed's engine.
        optimizer: what ``deepspeed.initialize`` returned as such.
        groups: process groups.
        device: where this rank computes.
        wrapped: whether DeepSpeed wraps the optimizer and reports a norm, as in every case but fp32 at stage
            0.
    """

    def __init__(
        self, ds: Any, optimizer: Any, groups: ParallelGroups, device: torch.device, wrapped: bool
    ) -> None:
        self.ds, self.optimizer, self.groups, self.device, self.wrapped = (
            ds,
            optimizer,
            groups,
            device,
            wrapped,
        )
        self._own_skipped_steps = 0

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because the norm was not finite; equal on all ranks."""
        return int(self.ds.skipped_steps) + self._own_skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self.ds.skipped_steps, self._own_skipped_steps = count, 0

    def __call__(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Losses (B, S)."""
        losses: torch.Tensor = self.ds(tokens, labels)
        return losses

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of one micro-batch's mean loss."""
        self.ds.backward(loss)
        if not last:
            self.ds.step()  # counts the micro-batch

    def update(self) -> float | torch.Tensor:
        """Clip and step; the global norm before clipping."""
        if self.wrapped:
            self.ds.step()
            norm: float | torch.Tensor | None = self.ds.get_global_grad_norm()
            assert norm is not None
            return norm
        parameters = list(self.ds.module.parameters())
        norm = gradient_norm(parameters, parameters, self.groups)
        finite = bool(norm.isfinite())  # waits, once a step, as DeepSpeed does at the other stages
        self._own_skipped_steps += not finite
        # What DeepSpeed's optimizers do by themselves: nothing changes. PyTorch's AdamW calls this flag
        # by the name it has for gradient scaling.
        self.optimizer.found_inf = None if finite else torch.ones((), device=self.device)
        self.ds.step()
        return norm

    def set_progress(self, step: int, samples: int) -> None:
        """Optimizer steps and samples so far, after a checkpoint was loaded."""
        self.ds.global_steps, self.ds.global_samples = step, samples

    def destroy(self) -> None:
        """Let go of hooks and memory."""
        self.ds.destroy()


@dataclass(eq=False)
class Engine:
    """A decoder, its optimizer and its parallel state, as ``build.build_engine`` makes it.

    Args:
        config: a validated run.
        groups: process groups of an initialised world.
        device: where this rank computes.
        module: the decoder.
        stepper: what steps it.
        micro_steps: micro-batches per optimizer step on each rank.
        zero_stage: ZeRO's stage, as the run asks for it.
        partition_stage: the stage that divides state here: 0 with one replica, which has nobody to share
            with.

    Attributes:
        parameters: by name, in the model's order.
        specs: of the unsharded parameters, likewise.
    """

    config: RunConfig
    groups: ParallelGroups
    device: torch.device
    module: Decoder
    stepper: Stepper
    micro_steps: int
    zero_stage: int
    partition_stage: int

    def __post_init__(self) -> None:
        self.parameters = dict(named_parameters_once(self.module))
        self.specs = {name: spec_of(parameter) for name, parameter in self.parameters.items()}

    @property
    def optimizer(self) -> Any:
        """PyTorch's, or DeepSpeed's around it."""
        return self.stepper.optimizer

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because the global norm of the gradient was not finite; equal on all
        ranks."""
        return self.stepper.skipped_steps

    def train_step(
        self, micro_batches: Sequence[torch.Tensor], first_samples: Sequence[int], lr: float
    ) -> StepResult:
        """Forward and backward over all micro-batches, then one optimizer step.

        Args:
            micro_batches: ``micro_steps`` tensors (B, S + 1) int64 on the CPU or the device.
            first_samples: global index of each micro-batch's first sample; seeds dropout.
            lr: learning rate of this step.
        """
        assert len(micro_batches) == self.micro_steps, (len(micro_batches), self.micro_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._set_training(True)
        losses = []
        for index, (batch, first_sample) in enumerate(zip(micro_batches, first_samples, strict=True)):
            if self.config.model.dropout > 0:
                seed_dropout(self.config.train.seed, first_sample)
            ids = self.to_device(batch)
            loss = self._counted(self.stepper(ids[:, :-1], ids[:, 1:])).mean()
            self.stepper.backward(loss, last=index == self.micro_steps - 1)
            losses.append(loss.detach())
        grad_norm = self.stepper.update()
        return StepResult(torch.stack(losses).mean(), grad_norm)

    def _set_training(self, training: bool) -> None:
        if self.module.training != training:  # it goes through all modules
            self.module.train(training)

    def to_device(self, batch: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on the device, without waiting for it: copies from unpinned memory would."""
        if self.device.type == "cuda" and batch.device.type == "cpu":
            batch = batch.pin_memory()  # the allocator reuses the pages only after the copy
        return batch.to(self.device, non_blocking=True)

    def losses(self, batch: torch.Tensor) -> torch.Tensor:
        """Per-token losses (B, S) of ids (B, S + 1), without gradients or dropout; (B, S - 1) if the last
        does not count."""
        self._set_training(False)
        with torch.no_grad():
            ids = self.to_device(batch)
            return self._counted(self.stepper(ids[:, :-1], ids[:, 1:]))

    def _counted(self, losses: torch.Tensor) -> torch.Tensor:
        """Those of (B, S) losses that ``train.predict_next_block`` says."""
        return losses if self.config.train.predict_next_block else losses[:, :-1]

    def mean_over_replicas(self, value: torch.Tensor) -> torch.Tensor:
        """Average of a tensor over data-parallel ranks."""
        return self.sum_over_replicas(value) / self.groups.dp_size

    def sum_over_replicas(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor over data-parallel ranks."""
        if self.groups.dp_size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total, group=self.groups.dp_group)
        return total

    def destroy(self) -> None:
        """Let go of hooks and memory; the engine is of no use afterwards."""
        self.stepper.destroy()


PIECE = 1 << 16
"""Elements whose squares a CPU adds in fp32, one after the other in eight lanes: of 131 million it loses 1.3
% of the norm."""


def gradient_norm(
    parameters: Sequence[nn.Parameter], holders: Sequence[torch.Tensor], groups: ParallelGroups
) -> torch.Tensor:
    """Global norm of whole gradients, 0-d fp64 on the device: every shard once, replicated parameters once.

    The same bits on all tensor-parallel ranks, and not finite on all where a gradient of any rank is not.

    Args:
        parameters: all of the model.
        holders: of the fp32 gradient of each.
        groups: process groups.
    """
    grads: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for parameter, holder in zip(parameters, holders, strict=True):
        assert holder.grad is not None
        split = groups.tp_size > 1 and spec_of(parameter).tp_dim is not None
        grads[split].append(holder.grad)
    device = grads[False][0].device if grads[False] else grads[True][0].device

    def squared(tensors: list[torch.Tensor]) -> torch.Tensor:
        if not tensors:
            return torch.zeros((), dtype=torch.float64, device=device)
        pieces = tensors if device.type != "cpu" else [p for t in tensors for p in t.reshape(-1).split(PIECE)]
        return (torch.stack(torch._foreach_norm(pieces)).double() ** 2).sum()

    replicated = squared(grads[False])
    if groups.tp_size == 1:
        return replicated.sqrt()
    # Rank 0's count. Times zero, what is not finite is no number, and reaches the others all the same.
    total = squared(grads[True]) + replicated * (1.0 if groups.tp_rank == 0 else 0.0)
    dist.all_reduce(total, group=groups.tp_group)
    return total.sqrt()
