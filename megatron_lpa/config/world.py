"""What of a run follows from the number of its processes."""

from __future__ import annotations

from dataclasses import replace

from megatron_lpa.config.run import RunConfig


def fitted_to_world(config: RunConfig, world_size: int) -> tuple[RunConfig, list[str]]:
    """The run with a micro-batch no larger than what a process gets of each step.

    A preset's micro-batch suits its usual number of GPUs. With more of them fewer sequences fall to each. The
    steps stay what they are, except for dropout, whose masks follow the micro-batch.

    Args:
        config: what ``load_config`` returned; not yet validated.
        world_size: number of processes.

    Returns:
        The run, and a note where it changed. What does not divide is left for ``validate_config`` to refuse.
    """
    train, tp_size = config.train, config.parallel.tensor_parallel_size
    if tp_size < 1 or world_size < 1 or world_size % tp_size:
        return config, []
    replicas = world_size // tp_size
    share, rest = divmod(train.global_batch_size, replicas)
    if rest or not 1 <= share < train.micro_batch_size:
        return config, []
    note = (
        f"train.micro_batch_size is {train.micro_batch_size}, but {replicas} data-parallel ranks get {share} "
        f"of a step's {train.global_batch_size} sequences each: it is {share} in this run"
        + ("; dropout draws other masks than with fewer ranks" if config.model.dropout > 0 else "")
    )
    return replace(config, train=replace(train, micro_batch_size=share)), [note]
