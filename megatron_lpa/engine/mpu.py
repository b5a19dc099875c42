"""What DeepSpeed asks about parallelism, answered from ``ParallelGroups``."""

from __future__ import annotations

import torch.distributed as dist

from megatron_lpa.parallel.groups import ParallelGroups


class ModelParallelUnit:
    """The ``mpu`` object of ``deepspeed.initialize``: model parallel means tensor parallel here."""

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
