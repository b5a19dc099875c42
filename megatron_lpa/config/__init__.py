"""Configuration of a run: dataclasses, loading from YAML and the command line, saving, checking."""

from megatron_lpa.config.kernels import KernelConfig
from megatron_lpa.config.loading import load_config, save_config
from megatron_lpa.config.model import (
    INPUT_PROJECTIONS,
    OUTPUT_PROJECTIONS,
    ModelConfig,
    ProjectionsConfig,
)
from megatron_lpa.config.presets import preset_names
from megatron_lpa.config.run import (
    DataConfig,
    LoggingConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_lpa.config.validation import validate_config
from megatron_lpa.config.world import fitted_to_world
from megatron_lpa.structures.projection import ProjectionConfig

__all__ = [
    "INPUT_PROJECTIONS",
    "OUTPUT_PROJECTIONS",
    "DataConfig",
    "KernelConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "ProjectionConfig",
    "ProjectionsConfig",
    "RunConfig",
    "TrainConfig",
    "fitted_to_world",
    "load_config",
    "preset_names",
    "save_config",
    "validate_config",
]
