"""Construction of an engine: the decoder for its ZeRO stage, the optimizer, DeepSpeed around them."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_lpa.config import RunConfig
from megatron_lpa.engine.cpu_adam import not_built
from megatron_lpa.engine.ds_config import build_ds_config, needs_deepspeed, offloads
from megatron_lpa.engine.joining import deepspeed, device_of_rank
from megatron_lpa.engine.stepping import DeepSpeedStep, Engine, OneReplica, OptimizerOf, Stepper
from megatron_lpa.model.dtypes import autocast_dtype, weights_dtype
from megatron_lpa.model.init import initialize
from megatron_lpa.model.recompute import recompute_for
from megatron_lpa.model.transformer import Decoder, DecoderLayer
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import spec_of


def build_engine(config: RunConfig, groups: ParallelGroups) -> Engine:
    """The engine of a run. Every rank calls it.

    Args:
        config: a validated run.
        groups: process groups of an initialised world.

    Raises:
        UserError: as ``build_ds_config``; DeepSpeed's CPU Adam cannot be built for lack of a toolkit or a
            compiler.
        TryAgain: as ``build_ds_config``; it cannot be built for another reason.
    """
    ds_config, device = build_ds_config(config, groups.dp_size), device_of_rank()
    zero_stage: int = ds_config["zero_optimization"]["stage"]
    micro_steps: int = ds_config["gradient_accumulation_steps"]
    one_replica = groups.dp_size == 1 and not needs_deepspeed(ds_config)
    partition_stage = 0 if one_replica else zero_stage
    module = _module(config, groups, ds_config, device, partitioned=partition_stage == 3)

    def optimizer_of(stepped_on: Callable[[nn.Parameter], torch.Tensor]) -> torch.optim.Optimizer:
        return build_optimizer(module, config, ds_config, device, stepped_on)

    stepper: Stepper
    if one_replica:
        dtype = weights_dtype(config.train.precision)
        stepper = OneReplica(module, dtype, optimizer_of, groups, micro_steps, config.optim.grad_clip)
    else:
        stepper = _deepspeed_step(module, ds_config, optimizer_of, groups, device)
    return Engine(config, groups, device, module, stepper, micro_steps, zero_stage, partition_stage)


def _deepspeed_step(
    module: Decoder,
    ds_config: dict[str, Any],
    optimizer_of: OptimizerOf,
    groups: ParallelGroups,
    device: torch.device,
) -> DeepSpeedStep:
    wrapped = ds_config["zero_optimization"]["stage"] != 0
    assert wrapped or not ds_config["bf16"]["enabled"]
    plain = optimizer_of(lambda parameter: parameter)
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints memory statistics whatever its log level
        ds, optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=plain,
            config=ds_config,
            mpu=ModelParallelUnit(groups),
            dist_init_required=False,
        )
    return DeepSpeedStep(ds, optimizer, groups, device, wrapped)


def _module(
    config: RunConfig,
    groups: ParallelGroups,
    ds_config: dict[str, Any],
    device: torch.device,
    partitioned: bool,
) -> Decoder:
    # Both groups matter: with mpu alone, zero.Init would partition over the whole world and
    # overwrite the shards of the other tensor-parallel ranks with those of rank 0. The precision
    # must come from the config: where fp16 is unsupported (CPUs), zero.Init turns dtype=float32
    # into bfloat16.
    construction = (
        deepspeed.zero.Init(
            data_parallel_group=groups.dp_group,
            mpu=ModelParallelUnit(groups),
            config_dict_or_path=ds_config,
        )
        if partitioned
        else device
    )
    with construction:
        module = Decoder(
            config.model,
            groups,
            config.parallel.lowdim_layout,
            recompute_for(config.train.activation_checkpointing),
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


def _gathered_for_writing(parameter: nn.Parameter) -> Any:
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def build_optimizer(
    module: nn.Module,
    config: RunConfig,
    ds_config: dict[str, Any],
    device: torch.device,
    stepped_on: Callable[[nn.Parameter], torch.Tensor],
) -> torch.optim.Optimizer:
    """AdamW for a module: PyTorch's, or DeepSpeed's on the CPU where a GPU's run offloads its state.

    Args:
        module: the decoder.
        config: the run.
        ds_config: what ``build_ds_config`` returned.
        device: where this rank computes.
        stepped_on: what to step on in place of each parameter.

    Raises:
        UserError: DeepSpeed's cannot be built for lack of a toolkit or a compiler.
        TryAgain: it cannot be built for another reason.
    """
    optim = config.optim
    decayed: list[torch.Tensor] = []
    plain: list[torch.Tensor] = []
    for parameter in module.parameters():
        decays = spec_of(parameter).decays(optim.decay_biases, optim.decay_norms)
        (decayed if decays else plain).append(stepped_on(parameter))
    param_groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    param_groups = [group for group in param_groups if group["params"]]  # DeepSpeed takes no empty one
    arguments: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    if device.type == "cuda" and offloads(ds_config, "offload_optimizer"):
        try:
            return deepspeed.ops.adam.DeepSpeedCPUAdam(param_groups, adamw_mode=True, **arguments)
        except Exception as error:  # it is compiled here, and compilers fail in many ways
            raise not_built(error, config.train.deepspeed_config) from error
    return torch.optim.AdamW(param_groups, fused=True, **arguments)


class ModelParallelUnit:
    """The ``mpu`` object of ``deepspeed.initialize``, answered from ``ParallelGroups``: model parallel means
    tensor parallel."""

    def __init__(self, groups: ParallelGroups) -> None:
        self._groups = groups

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that share one copy of the model."""
        return self._groups.tp_group

    def get_model_parallel_rank(self) -> int:
        """Rank in that group."""
        return self._groups.tp_rank

    def get_model_parallel_world_size(self) -> int:
        """Size of that group."""
        return self._groups.tp_size

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_tensor_model_parallel_src_rank(self) -> int:
        """World rank of the group's first member."""
        return self._groups.dp_rank * self._groups.tp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the same shard and see different data."""
        return self._groups.dp_group

    def get_data_parallel_rank(self) -> int:
        """Rank in that group."""
        return self._groups.dp_rank

    def get_data_parallel_world_size(self) -> int:
        """Size of that group."""
        return self._groups.dp_size
