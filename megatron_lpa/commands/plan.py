"""What a run will cost, before a GPU is asked for: parameters, FLOPs, bytes per GPU, elements moved.

    python tools/plan.py --preset 3b/lpa --gpus 16 --zero-stage 3
    python tools/plan.py --config my_run.yaml --json --model.hidden_size 2048

Any option of ``python -m megatron_lpa.pretrain`` works too. No model is built, no data is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
from collections.abc import Sequence

from megatron_lpa.command_line import command, tool_parser
from megatron_lpa.config import fitted_to_world, load_config, validate_config
from megatron_lpa.errors import UserError
from megatron_lpa.planning.flops import (
    flops_per_token_forward,
    flops_per_token_training,
    hardware_flops_per_token_training,
)
from megatron_lpa.planning.memory import estimate_memory
from megatron_lpa.planning.parameters import count_parameters
from megatron_lpa.planning.traffic import collective_elements_per_token

logger = logging.getLogger(__name__)


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This tool's own options, and the rest for ``load_config``."""
    parser = tool_parser(
        "Parameters, FLOPs, memory and communication of a run, from its configuration alone.",
        usage="python tools/plan.py --preset FAMILY/VARIANT [options] [--KEY VALUE ...]",
        epilog="Options of megatron_lpa.pretrain (--config, --model.hidden_size, ...) work too.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--gpus", type=int, help="world size; default: the tensor-parallel size")
    parser.add_argument(
        "--zero-stage", type=int, choices=range(4), help="default: that of train.deepspeed_config"
    )
    parser.add_argument("--offload-optimizer", action="store_true", help="optimizer state on the host")
    for name, key in (
        ("--tensor-parallel-size", "--parallel.tensor_parallel_size"),
        ("--micro-batch-size", "--train.micro_batch_size"),
    ):
        parser.add_argument(name, dest=key, metavar="N", help=f"short for {key}")
    own, rest = parser.parse_known_args(argv)
    for key, value in vars(own).items():
        if key.startswith("--") and value is not None:
            rest += [key, value]
    return own, rest


def zero_from(deepspeed_config: str) -> tuple[int, bool]:
    """Stage, and whether the optimizer is offloaded, of a configuration in ``ds_configs/`` by its name."""
    match = re.fullmatch(r"zero([0-3])(_offload)?", deepspeed_config)
    if match is None:
        raise UserError(
            f"train.deepspeed_config is {deepspeed_config}; give --zero-stage 0, 1, 2 or 3 with it"
        )
    return int(match[1]), match[2] is not None


def plan(argv: Sequence[str]) -> tuple[dict[str, object], list[str], bool]:
    """The numbers, warnings, and whether JSON was asked for.

    Raises:
        UserError: the configuration cannot run on so many GPUs.
    """
    own, rest = parse_arguments(argv)
    config = load_config(rest)
    gpus = config.parallel.tensor_parallel_size if own.gpus is None else own.gpus
    config, warnings = fitted_to_world(config, gpus)
    warnings += validate_config(config, own.gpus, need_data=False)
    model, parallel, train = config.model, config.parallel, config.train
    zero_stage, offload = (
        zero_from(train.deepspeed_config) if own.zero_stage is None else (own.zero_stage, False)
    )
    data_parallel_size = gpus // parallel.tensor_parallel_size
    parameters = count_parameters(model)
    per_gpu = estimate_memory(
        model,
        parallel,
        train,
        config.kernels,
        data_parallel_size=data_parallel_size,
        zero_stage=zero_stage,
        offload_optimizer=offload or own.offload_optimizer,
    )
    moved = collective_elements_per_token(model, parallel)
    tokens_per_step = train.global_batch_size * model.sequence_length
    flops = flops_per_token_training(model)
    numbers: dict[str, object] = {
        "parameters": parameters.total,
        **{f"parameters_{name}": value for name, value in dataclasses.asdict(parameters).items()},
        "flops_per_token_forward": flops_per_token_forward(model),
        "flops_per_token_training": flops,
        "hardware_flops_per_token_training": hardware_flops_per_token_training(
            model, train.activation_checkpointing
        ),
        "tokens_per_step": tokens_per_step,
        "flops_per_step": flops * tokens_per_step,
        "bytes_parameters_per_gpu": per_gpu.bytes_parameters,
        "bytes_gradients_per_gpu": per_gpu.bytes_gradients,
        "bytes_optimizer_state_per_gpu": per_gpu.bytes_optimizer_state,
        "bytes_optimizer_state_host_per_gpu": per_gpu.bytes_optimizer_state_host,
        "bytes_activations_per_gpu": per_gpu.bytes_activations,
        "bytes_total_per_gpu": per_gpu.bytes_total,
        # Before the factor (T-1)/T, which is 0 without tensor parallelism.
        "collective_elements_per_token_per_layer_forward": moved.forward,
        "collective_elements_per_token_per_layer_forward_attention": moved.attention_forward,
        "collective_elements_per_token_per_layer_backward": moved.backward,
        "collective_elements_factor": 1 - 1 / parallel.tensor_parallel_size,
        "world_size": gpus,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "data_parallel_size": data_parallel_size,
        "lowdim_layout": parallel.lowdim_layout,
        "zero_stage": zero_stage,
        "micro_batch_size": train.micro_batch_size,
        "global_batch_size": train.global_batch_size,
        "precision": train.precision,
        "activation_checkpointing": train.activation_checkpointing,
    }
    return numbers, warnings, own.json


def readable(key: str, value: object) -> str:
    """One value with a unit a person can judge."""
    if not isinstance(value, int):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    if key.startswith("bytes_"):
        return f"{value:,} ({value / 2**30:.2f} GiB)"
    if "flops" in key:
        return f"{value:,} ({value / 1e9:.2f} GFLOP)"
    if key.startswith("parameters"):
        return f"{value:,} ({value / 1e6:.1f}M)"
    return f"{value:,}"


@command()
def main(argv: Sequence[str]) -> int:
    """Print the plan; 0."""
    numbers, warnings, as_json = plan(argv)
    for warning in warnings:
        logger.warning(warning)
    if as_json:
        print(json.dumps(numbers, indent=2))
    else:
        width = max(map(len, numbers))
        for key, value in numbers.items():
            print(f"{key:<{width}}  {readable(key, value)}")
    return 0
