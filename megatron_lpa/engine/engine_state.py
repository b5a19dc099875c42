"""What training holds, where DeepSpeed keeps it, for every ZeRO stage: all that a checkpoint asks for.

The only module that knows DeepSpeed's internals.

| stage | fragments that this process holds | where |
|---|---|---|
| 0 | the whole shard | the parameter itself; with one replica its fp32 master |
| 1, 2 | what falls into its partition of the flat parameter group | ``param_groups`` of the optimizer inside |
| 3 | its partition of the shard, less the padding at the end | ``fp32_partitioned_groups_flat`` |
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_lpa.checkpoint.training_state import KINDS, MASTER, MOMENTS, Fragment
from megatron_lpa.engine.joining import deepspeed
from megatron_lpa.engine.stepping import Engine, OneReplica
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import merge
from megatron_lpa.structures.parameter_spec import ParameterSpec


@dataclass(frozen=True, eq=False)
class HeldFragment(Fragment):
    """A fragment, and where its state is.

    Args:
        flat: what the optimizer steps on; the fragment is a part of it.
        offset: the fragment's first element in ``flat``.
        optimizer: PyTorch's AdamW, or DeepSpeed's on the CPU.
    """

    flat: torch.Tensor
    offset: int
    optimizer: torch.optim.Optimizer

    def view(self, kind: str) -> torch.Tensor:
        """(length,) fp32: the state itself, not a copy."""
        whole = self.flat if kind == MASTER else self.optimizer.state[self.flat][kind]
        assert whole.dtype == torch.float32, (self.name, kind, whole.dtype)
        return whole.detach().view(-1).narrow(0, self.offset, self.length)


class EngineState:
    """The state of an engine, as ``checkpoint.training_state.TrainingState`` has it.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.groups, self.config = engine, engine.groups, engine.config
        self.zero_stage, self.specs = engine.zero_stage, engine.specs
        self.weight_bytes = max(parameter.itemsize for parameter in engine.parameters.values())
        self.versions = {"deepspeed": deepspeed.__version__}

    def skipped_steps(self) -> int:
        """Steps that changed nothing because the gradient's norm was not finite."""
        return self.engine.stepper.skipped_steps

    def settle(self) -> None:
        """Wait until the device has done what training asked of it: DeepSpeed works on streams of its own."""
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()

    def fragments(self) -> list[HeldFragment]:
        """What this process holds, in the model's order of parameters."""
        return list(self._fragments())

    def _fragments(self) -> Iterator[HeldFragment]:
        for name, parameter in self.engine.parameters.items():
            spec = self.engine.specs[name]
            start, length, flat, offset, optimizer = _place(self.engine, parameter)
            if length == 0:
                continue
            copy, copies = _copy_number(spec, self.engine.partition_stage, self.engine.groups)
            yield HeldFragment(name, spec, start, length, copy, copies, flat, offset, optimizer)

    def is_finite(self) -> bool:
        """Whether all masters and moments that this process holds are finite numbers."""
        checks = []
        for fragment in self._fragments():
            kinds = KINDS if fragment.optimizer.state.get(fragment.flat) else (MASTER,)
            checks += [fragment.view(kind).isfinite().all() for kind in kinds]
        return all(map(bool, checks))

    def optimizer_step(self) -> int:
        """AdamW's count of steps here; 0 before the first, when it has no moments, and where no fragment is
        held."""
        states = (fragment.optimizer.state.get(fragment.flat) for fragment in self._fragments())
        steps = {int(state["step"]) if state else 0 for state in states}
        assert len(steps) <= 1, steps
        return max(steps, default=0)

    def gathered_weights(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Every parameter's name and unsharded value: on rank 0's device, with memory of its own; None on
        other ranks.

        Every rank has to go through all of them: each is gathered by collectives.
        """
        for name, parameter in self.engine.parameters.items():
            yield name, _unsharded(self.engine, parameter, self.engine.specs[name])

    def set_optimizer_step(self, step: int) -> None:
        """Give AdamW the state that it would create at its first step, with this count of steps. No
        collective."""
        for fragment in self._fragments():
            optimizer, flat = fragment.optimizer, fragment.flat
            if step == 0:
                optimizer.state.pop(flat, None)
                continue
            state = optimizer.state[flat]
            for kind in MOMENTS:
                if kind not in state:
                    state[kind] = torch.zeros_like(flat.detach(), memory_format=torch.preserve_format)
            # A tensor beside the parameter for PyTorch's fused AdamW, a number for DeepSpeed's on the CPU.
            fused = isinstance(optimizer, torch.optim.AdamW)
            state["step"] = torch.tensor(float(step), device=flat.device) if fused else step
        # The views of the moments behind deepspeed.utils.safe_get_*.
        if self.engine.partition_stage in (1, 2):
            self.engine.optimizer._hp_optimizer_states_linked = False
            if step:
                self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def before_restoring(self) -> None:
        """ZeRO-3 keeps small parameters whole: let go of those copies. No collective."""
        if self.engine.partition_stage == 3:
            self.engine.optimizer.checkpoint_event_prologue()

    def after_restoring(self, step: int, samples: int, skipped_steps: int) -> None:
        """Make what computes (bf16 copies, gathered parameters) follow from the masters; every rank calls it.

        Args:
            step: optimizer steps done.
            samples: consumed.
            skipped_steps: of these, those that changed nothing.
        """
        stepper, zero = self.engine.stepper, self.engine.optimizer
        if isinstance(stepper, OneReplica):
            stepper.follow_masters()
        elif self.engine.partition_stage in (1, 2):
            zero.update_lp_params()
        elif self.engine.partition_stage == 3:
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero.checkpoint_event_epilogue()
        stepper.set_progress(step, samples)
        stepper.skipped_steps = skipped_steps


def gathered_for_reading(engine: Engine, parameter: nn.Parameter) -> Any:
    """Context in which ``parameter`` holds this rank's whole tensor-parallel shard."""
    if engine.partition_stage != 3:
        return nullcontext()
    return deepspeed.zero.GatheredParameters([parameter])


def _unsharded(engine: Engine, parameter: nn.Parameter, spec: ParameterSpec) -> torch.Tensor | None:
    groups = engine.groups
    with gathered_for_reading(engine, parameter), torch.no_grad():
        own = parameter.detach().clone().contiguous()
    if groups.tp_size == 1 or spec.tp_dim is None:
        return own if groups.rank == 0 else None
    if groups.dp_rank != 0:
        return None
    parts = [torch.empty_like(own) for _ in range(groups.tp_size)]
    dist.all_gather(parts, own, group=groups.tp_group)
    return merge(parts, spec).contiguous() if groups.rank == 0 else None


def _copy_number(spec: ParameterSpec, partition_stage: int, groups: ParallelGroups) -> tuple[int, int]:
    copy, copies = (groups.dp_rank, groups.dp_size) if partition_stage == 0 else (0, 1)
    if spec.tp_dim is None:
        copy, copies = copy * groups.tp_size + groups.tp_rank, copies * groups.tp_size
    return copy, copies


def _place(engine: Engine, parameter: nn.Parameter) -> tuple[int, int, torch.Tensor, int, Any]:
    """First element and length in the shard, and ``flat``, ``offset`` and ``optimizer`` as ``HeldFragment``
    has them."""
    zero: Any = engine.stepper.optimizer
    known: Any = parameter
    if engine.partition_stage == 0:
        stepper = engine.stepper
        master = stepper.master_of[parameter] if isinstance(stepper, OneReplica) else parameter
        return 0, parameter.numel(), master, 0, zero
    if engine.partition_stage == 3:
        group, offset, partition = zero.grad_position[zero.get_param_id(known)]
        start = partition * zero._get_param_partition_rank(known)
        length = max(0, min(partition, known.ds_numel - start))
        return start, length, zero.fp32_partitioned_groups_flat[group], offset, _stepping(zero, group)
    mapping = known._hp_mapping
    if mapping is None:  # nothing of it is in this process's partition
        return 0, 0, parameter, 0, zero
    # Under this name in both of DeepSpeed's classes: bf16 with fp32 gradients at stage 1 has one of its own.
    (flat,) = zero.optimizer.param_groups[mapping.param_group_index]["params"]
    address = mapping.lp_fragment_address
    return address.start, address.numel, flat, mapping.get_hp_fragment_address().start, zero.optimizer


def _stepping(zero: Any, group: int) -> torch.optim.Optimizer:
    """ZeRO-3 with partial offload steps some groups on the device, with an optimizer of their own."""
    on_device = zero.offload_optimizer and zero.subgroup_to_device[group] != "cpu"
    return zero.backup_optimizer if on_device else zero.optimizer
