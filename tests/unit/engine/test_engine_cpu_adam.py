"""DeepSpeed's CPU Adam that cannot be built: what lasts until somebody changes something, and what may be
gone."""

from __future__ import annotations

import errno
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron_lpa.engine import cpu_adam
from megatron_lpa.engine.build import build_optimizer
from megatron_lpa.errors import TryAgain, UserError

import deepspeed  # isort: skip
from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException  # isort: skip


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def built(error: Exception, monkeypatch: pytest.MonkeyPatch) -> UserError:
    """What the engine raises where building raises ``error``."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", fail)
    ds_config = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    optim: Any = SimpleNamespace(lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.1)
    config: Any = SimpleNamespace(train=SimpleNamespace(deepspeed_config="offload.json"), optim=optim)
    with pytest.raises(UserError, match=r"offload\.json: DeepSpeed's CPU Adam cannot be built") as caught:
        build_optimizer(nn.Module(), config, ds_config, torch.device("cuda"), lambda parameter: parameter)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    return caught.value


EXTENSION = "Error building extension 'cpu_adam': [1/3] c++ -MMD\n" + "x\n" * 10_000


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"), OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EMFILE, "Too many open files"), MemoryError(),
        caused(RuntimeError(EXTENSION + "c++: fatal error: Killed"), subprocess.CalledProcessError(1,
        "ninja")),
        RuntimeError(EXTENSION + "fatal error: cannot write: No space left on device; command not found"),
        caused(RuntimeError(EXTENSION + "x: not found"), subprocess.CalledProcessError(-9, "ninja")),
        caused(MissingCUDAException("Unable to run nvcc"), OSError(errno.EMFILE, "Too many open files")),
        caused(MissingCUDAException("Unable to run nvcc"), subprocess.CalledProcessError(-9, "nvcc")),
    ],
    ids=lambda error: str(error)[-30:],
)  # fmt: skip
def test_what_may_be_gone_is_tried_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = built(error, monkeypatch)
    assert isinstance(raised, TryAgain) and raised.exit_code == 1


@pytest.mark.parametrize(
    "error",
    [
        MissingCUDAException("CUDA_HOME does not exist"),
        CUDAMismatchException("version 11.8 does not match"),
        caused(MissingCUDAException("Unable to run nvcc"), FileNotFoundError(errno.ENOENT, "No such file",
        "nvcc")),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "c++"),
        RuntimeError(EXTENSION + "/bin/sh: 1: c++: not found"),
        RuntimeError(EXTENSION + "fatal error: cuda_runtime.h: No such file or directory"),
        RuntimeError(EXTENSION + "/usr/bin/ld: cannot find -lcurand"),
    ],
    ids=lambda error: str(error)[-30:],
)  # fmt: skip
def test_a_missing_toolkit_or_compiler_lasts(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    raised = built(error, monkeypatch)
    assert not isinstance(raised, TryAgain) and raised.exit_code == 78
    assert "install the CUDA toolkit" in str(raised)


@pytest.mark.parametrize(("found", "kind"), [(None, UserError), ("/usr/bin/ninja", TryAgain)])
def test_ninja_is_missing_only_where_it_is_not_found(
    found: str | None, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_adam.shutil, "which", lambda name: found)
    error = RuntimeError("Unable to JIT load the cpu_adam op due to ninja not being installed.")
    assert type(built(error, monkeypatch)) is kind
