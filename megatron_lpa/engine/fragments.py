"""The fp32 masters and AdamW's moments, where they are kept, for every ZeRO stage.

The only module that knows DeepSpeed's internals. A *shard* is a parameter's part on one tensor-parallel
rank, flattened. A *fragment* is the range of it whose state this process holds:

| stage | this process holds | where |
|---|---|---|
| 0 | the whole shard | the parameter itself; with one replica its fp32 master |
| 1, 2 | what falls into its partition of the flat parameter group | ``param_groups`` of the optimizer inside |
| 3 | its partition of the shard, less the padding at the end | ``fp32_partitioned_groups_flat`` |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_lpa.checkpoint.reshard import MASTER, MOMENTS
from megatron_lpa.engine.build import Engine
from megatron_lpa.engine.stepping import OneReplica
from megatron_lpa.model.init import named_parameters_once
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import ParameterSpec, spec_of


@dataclass(frozen=True, eq=False)
class Fragment:
    """A range of one shard, and where its state is.

    Args:
        name: the parameter.
        spec: the parameter's spec.
        start: first element, in the flattened shard.
        length: elements.
        copy: number of this copy; other processes hold equal ones.
        copies: how many there are.
        flat: what the optimizer steps on; the fragment is a part of it.
        offset: the fragment's first element in ``flat``.
        optimizer: PyTorch's AdamW, or DeepSpeed's on the CPU.
    """

    name: str
    spec: ParameterSpec
    start: int
    length: int
    copy: int
    copies: int
    flat: torch.Tensor
    offset: int
    optimizer: torch.optim.Optimizer

    def view(self, kind: str) -> torch.Tensor:
        """(length,) fp32: the state itself, not a copy."""
        whole = self.flat if kind == MASTER else self.optimizer.state[self.flat][kind]
        assert whole.dtype == torch.float32, (self.name, kind, whole.dtype)
        return whole.detach().view(-1).narrow(0, self.offset, self.length)

    def share(self) -> tuple[int, int]:
        """``(first, end)`` inside the fragment of what this process writes; the copies divide it."""
        return self.length * self.copy // self.copies, self.length * (self.copy + 1) // self.copies


def held_fragments(engine: Engine) -> list[Fragment]:
    """The fragments that this process holds, in the model's order of parameters."""
    return list(_held_fragments(engine))


def _held_fragments(engine: Engine) -> Iterator[Fragment]:
    groups = engine.groups
    for name, parameter in named_parameters_once(engine.module):
        spec = spec_of(parameter)
        place = _place(engine, parameter)
        if place is None or place.length == 0:
            continue
        copy, copies = _copy_number(spec, engine.partition_stage, groups)
        yield Fragment(
            name, spec, place.start, place.length, copy, copies, place.flat, place.offset, place.optimizer
        )


def _copy_number(spec: ParameterSpec, partition_stage: int, groups: ParallelGroups) -> tuple[int, int]:
    copy, copies = (groups.dp_rank, groups.dp_size) if partition_stage == 0 else (0, 1)
    if spec.tp_dim is None:
        copy, copies = copy * groups.tp_size + groups.tp_rank, copies * groups.tp_size
    return copy, copies


@dataclass(frozen=True)
class _Place:
    start: int
    length: int
    flat: torch.Tensor
    offset: int
    optimizer: torch.optim.Optimizer


def _place(engine: Engine, parameter: nn.Parameter) -> _Place | None:
    if engine.partition_stage == 0:
        stepper = engine.stepper
        master = stepper.master_of(parameter) if isinstance(stepper, OneReplica) else parameter
        return _Place(0, parameter.numel(), master, 0, engine.optimizer)
    zero: Any = engine.optimizer
    known: Any = parameter
    if engine.partition_stage == 3:
        group, offset, partition = zero.grad_position[zero.get_param_id(known)]
        start = partition * zero._get_param_partition_rank(known)
        length = max(0, min(partition, known.ds_numel - start))
        return _Place(start, length, zero.fp32_partitioned_groups_flat[group], offset, _stepping(zero, group))
    mapping = known._hp_mapping
    if mapping is None:  # nothing of it is in this process's partition
        return None
    # Under this name in both of DeepSpeed's classes: bf16 with fp32 gradients at stage 1 has one of its own.
    (flat,) = zero.optimizer.param_groups[mapping.param_group_index]["params"]
    address = mapping.lp_fragment_address
    return _Place(address.start, address.numel, flat, mapping.get_hp_fragment_address().start, zero.optimizer)


def _stepping(zero: Any, group: int) -> torch.optim.Optimizer:
    """ZeRO-3 with partial offload steps some groups on the device, with an optimizer of their own."""
    on_device = zero.offload_optimizer and zero.subgroup_to_device[group] != "cpu"
    return zero.backup_optimizer if on_device else zero.optimizer


def state_is_finite(engine: Engine) -> bool:
    """Whether all masters and moments that this process holds are finite numbers."""
    checks = []
    for fragment in held_fragments(engine):
        kinds = (MASTER, *MOMENTS) if fragment.optimizer.state.get(fragment.flat) else (MASTER,)
        checks += [fragment.view(kind).isfinite().all() for kind in kinds]
    return all(map(bool, checks))


def optimizer_step(fragments: Sequence[Fragment]) -> int:
    """AdamW's count of steps; 0 before the first, when it has no state yet."""
    steps = {
        int(f.optimizer.state[f.flat]["step"]) if f.optimizer.state.get(f.flat) else 0 for f in fragments
    }
    assert len(steps) <= 1, steps
    return max(steps, default=0)


def set_optimizer_step(engine: Engine, fragments: Sequence[Fragment], step: int) -> None:
    """Give AdamW the state that it would create at its first step, with this count of steps."""
    for fragment in fragments:
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
    if engine.partition_stage in (1, 2):  # the views of the moments behind deepspeed.utils.safe_get_*
        engine.optimizer._hp_optimizer_states_linked = False
        if step:
            engine.optimizer._lazy_init_hp_params_optimizer_state()


def before_restoring(engine: Engine) -> None:
    """ZeRO-3 keeps small parameters whole: let go of those copies. No collective."""
    if engine.partition_stage == 3:
        engine.optimizer.checkpoint_event_prologue()


def after_restoring(engine: Engine) -> None:
    """Make what computes (bf16 copies, gathered parameters) follow from the masters; every rank calls it."""
    zero: Any = engine.optimizer
    if isinstance(engine.stepper, OneReplica):
        engine.stepper.follow_masters()
    elif engine.partition_stage in (1, 2):
        zero.update_lp_params()
    elif engine.partition_stage == 3:
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()
