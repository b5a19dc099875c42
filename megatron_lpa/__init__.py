"""Pretraining of language models with low-dimensional projected attention (LPA).

What is listed in ``__all__`` is public: ``docs/api.md`` describes it, and it stays compatible within a minor
version. It is loaded at its first use, so that ``import megatron_lpa`` needs no PyTorch. Everything else may
change at any time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lpa.config import RunConfig, load_config, preset_names, save_config, validate_config
    from megatron_lpa.data.storage.indexed import IndexedDataset
    from megatron_lpa.errors import UserError
    from megatron_lpa.evaluate.generation import Sampling, generate_text
    from megatron_lpa.evaluate.metrics_file import read_metrics
    from megatron_lpa.evaluate.perplexity import measure
    from megatron_lpa.evaluate.trained import TrainedRun, load_run
    from megatron_lpa.planning.flops import flops_per_token_training
    from megatron_lpa.planning.memory import estimate_memory
    from megatron_lpa.planning.parameters import count_parameters

__version__ = "0.1.0"

__all__ = [
    "IndexedDataset",
    "RunConfig",
    "Sampling",
    "TrainedRun",
    "UserError",
    "__version__",
    "count_parameters",
    "estimate_memory",
    "flops_per_token_training",
    "generate_text",
    "load_config",
    "load_run",
    "measure",
    "preset_names",
    "read_metrics",
    "save_config",
    "validate_config",
]

_HOMES = {
    "config": ("RunConfig", "load_config", "preset_names", "save_config", "validate_config"),
    "data.storage.indexed": ("IndexedDataset",),
    "errors": ("UserError",),
    "evaluate.generation": ("Sampling", "generate_text"),
    "evaluate.metrics_file": ("read_metrics",),
    "evaluate.perplexity": ("measure",),
    "evaluate.trained": ("TrainedRun", "load_run"),
    "planning.flops": ("flops_per_token_training",),
    "planning.memory": ("estimate_memory",),
    "planning.parameters": ("count_parameters",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
