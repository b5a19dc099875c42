"""A decoder inside DeepSpeed: construction, the optimizer step, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_lpa.config import OptimConfig, RunConfig
from megatron_lpa.engine.cpu_adam import not_built
from megatron_lpa.engine.ds_config import build_ds_config, needs_deepspeed, offloads
from megatron_lpa.engine.joining import device_of_rank  # imported first: sets the accelerator
from megatron_lpa.engine.mpu import ModelParallelUnit
from megatron_lpa.engine.stepping import DeepSpeedStep, OneReplica, Stepper
from megatron_lpa.model.dtypes import autocast_dtype, weights_dtype
from megatron_lpa.model.init import initialize
from megatron_lpa.model.recompute import recompute_for
from megatron_lpa.model.transformer import Decoder, DecoderLayer
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.rng import seed_dropout
from megatron_lpa.parallel.sharding import spec_of

import deepspeed  # isort: skip


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step computed.

    Args:
        loss: mean loss of this rank's micro-batches, 0-d fp32, on the device.
        grad_norm: global gradient norm before clipping; a tensor stays on the device until someone reads it.
    """

    loss: torch.Tensor
    grad_norm: float | torch.Tensor


class Engine:
    """A decoder, its optimizer and its parallel state.

    Args:
        config: a validated run.
        groups: process groups of an initialised world.

    Attributes:
        zero_stage: ZeRO's stage, as the run asks for it.
        partition_stage: the stage that divides state here: 0 with one replica, which has nobody to share with.
    """

    def __init__(self, config: RunConfig, groups: ParallelGroups) -> None:
        self.config = config
        self.groups = groups
        self.device = device_of_rank()
        self.ds_config = build_ds_config(config, groups.dp_size)
        self.zero_stage: int = self.ds_config["zero_optimization"]["stage"]
        one_replica = groups.dp_size == 1 and not needs_deepspeed(self.ds_config)
        self.partition_stage = 0 if one_replica else self.zero_stage
        self.module = self._build_module()
        self.stepper: Stepper = self._build_replica() if one_replica else self._build_deepspeed()
        self.optimizer: Any = self.stepper.optimizer

    def _build_replica(self) -> OneReplica:
        config = self.config
        return OneReplica(
            self.module,
            weights_dtype(config.train.precision),
            lambda stepped_on: self._build_optimizer(config.optim, stepped_on),
            self.groups,
            self.micro_steps,
            config.optim.grad_clip,
        )

    def _build_deepspeed(self) -> DeepSpeedStep:
        optim = self.config.optim
        return DeepSpeedStep(
            self.module,
            self.ds_config,
            lambda stepped_on: self._build_optimizer(optim, stepped_on),
            self.groups,
        )

    def _build_module(self) -> Decoder:
        config, groups = self.config, self.groups
        recompute = recompute_for(config.train.activation_checkpointing)
        partitioned = self.partition_stage == 3
        # Both groups matter: with mpu alone, zero.Init would partition over the whole world and
        # overwrite the shards of the other tensor-parallel ranks with those of rank 0. The precision
        # must come from the config: where fp16 is unsupported (CPUs), zero.Init turns dtype=float32
        # into bfloat16.
        construction = (
            deepspeed.zero.Init(
                data_parallel_group=groups.dp_group,
                mpu=ModelParallelUnit(groups),
                config_dict_or_path=self.ds_config,
            )
            if partitioned
            else self.device
        )
        with construction:
            module = Decoder(
                config.model,
                groups,
                config.parallel.lowdim_layout,
                recompute,
                config.kernels,
                autocast_dtype(config.train.precision),
            )
        if partitioned:
            # A layer's parameters are gathered together, by one set of hooks instead of one per module inside.
            deepspeed.utils.set_z3_leaf_modules(module, [DecoderLayer])
            initialize(module, config.model, groups, config.train.seed, _gathered_for_writing)
        else:
            initialize(module, config.model, groups, config.train.seed)
        return module

    def _build_optimizer(
        self, optim: OptimConfig, stepped_on: Callable[[nn.Parameter], torch.Tensor]
    ) -> torch.optim.Optimizer:
        decayed: list[torch.Tensor] = []
        plain: list[torch.Tensor] = []
        for parameter in self.module.parameters():
            (decayed if spec_of(parameter).decays_by(optim) else plain).append(stepped_on(parameter))
        param_groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        param_groups = [group for group in param_groups if group["params"]]  # DeepSpeed takes no empty one
        arguments: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
        if self.device.type == "cuda" and offloads(self.ds_config, "offload_optimizer"):
            try:
                return deepspeed.ops.adam.DeepSpeedCPUAdam(param_groups, adamw_mode=True, **arguments)
            except Exception as error:  # it is compiled here, and compilers fail in many ways
                raise not_built(error, self.config.train.deepspeed_config) from error
        return torch.optim.AdamW(param_groups, fused=True, **arguments)

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because the global norm of the gradient was not finite; equal on all ranks."""
        return self.stepper.skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self.stepper.skipped_steps = count

    @property
    def micro_steps(self) -> int:
        """Micro-batches per optimizer step on each rank."""
        return int(self.ds_config["gradient_accumulation_steps"])

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
        """Per-token losses (B, S) of ids (B, S + 1), without gradients or dropout; (B, S - 1) if the last does not count."""
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


def _gathered_for_writing(parameter: nn.Parameter) -> Any:
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def gathered_for_reading(engine: Engine, parameter: nn.Parameter) -> Any:
    """Context in which ``parameter`` holds this rank's whole tensor-parallel shard."""
    if engine.partition_stage != 3:
        return nullcontext()
    return deepspeed.zero.GatheredParameters([parameter])
