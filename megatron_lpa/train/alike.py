"""What all processes of a run have to have in common; ``parallel/meeting.py`` compares it before anything
else."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import megatron_lpa
from megatron_lpa.checkpoint.progress import SampleOrder
from megatron_lpa.config import RunConfig
from megatron_lpa.data.splits import Splits
from megatron_lpa.engine.ds_config import check_by_deepspeed, find_ds_config, read_zero_knobs
from megatron_lpa.engine.zero_knobs import check_device
from megatron_lpa.files import files_below, tree_digest
from megatron_lpa.parallel.disagreement import flat

PACKAGES = ("torch", "deepspeed", "triton", "numpy", "safetensors", "liger-kernel")
VARIABLES = (
    "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE", "NCCL_ALGO", "NCCL_PROTO", "TRITON_INTERPRET", "TORCH_COMPILE_DISABLE",
    "TORCHDYNAMO_DISABLE",
    "DS_ACCELERATOR", "ONEDNN_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY",
)  # fmt: skip
"""Of the environment: what changes arithmetic, or how ranks add up. All are of libraries; none is ours."""

PACKAGE = Path(megatron_lpa.__file__).parent
CODE = ("*.py", "*.yaml", "*.json")


def start_facts(config: RunConfig) -> dict[str, Any]:
    """The resolved config, DeepSpeed's, the code, the libraries and the kind of device, by names that a user
    knows.

    Raises:
        UserError: DeepSpeed's configuration cannot be used.
    """
    knobs = read_zero_knobs(config.train.deepspeed_config, config.train.precision)
    check_by_deepspeed(knobs["zero_optimization"], config.train.deepspeed_config)
    if not torch.cuda.is_available():
        check_device(find_ds_config(config.train.deepspeed_config), knobs["zero_optimization"])
    facts = dict(flat(dataclasses.asdict(config)))
    facts |= {f"{config.train.deepspeed_config}: {name}": value for name, value in flat(knobs)}
    facts |= {f"version of {name}": _version(name) for name in PACKAGES}
    return facts | {
        "version of megatron_lpa": megatron_lpa.__version__,
        "version of Python": ".".join(platform.python_version_tuple()[:2]),
        "version of CUDA": torch.version.cuda,
        "hash of the code of megatron_lpa": tree_digest(PACKAGE, files_below(PACKAGE, CODE))[:16],
        "kind of device": "GPU" if torch.cuda.is_available() else "CPU",
        **{f"environment variable {name}": os.environ.get(name) for name in sorted(VARIABLES)},
    }


def sample_order(config: RunConfig, splits: Splits) -> SampleOrder:
    """What the order of training samples depends on. It reads a little of the data: once, at the start, so
    that this is not what keeps a checkpoint from being written later.

    Raises:
        UserError: a file cannot be read.
    """
    train, samples = config.train, splits.train
    return SampleOrder(train.seed, samples.num_samples, train.global_batch_size, samples.facts())


def data_facts(splits: Splits, order: SampleOrder) -> dict[str, Any]:
    """What tells the data that this process has opened from other data, and the order that it is read in."""
    facts = {"samples of an epoch": order.samples_per_epoch, "training data": order.data}
    for split in (splits.valid, splits.test):
        if split is not None:
            facts[f"{split.name} data"] = [split.num_samples, split.facts()]
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
