"""Runs the kernels' tests on the CPU, in a process of their own: see conftest.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lpa.ops.dispatch import why_no_interpreter

NO_INTERPRETER = None
if importlib.util.find_spec("triton") is not None:
    import triton

    NO_INTERPRETER = why_no_interpreter(triton.__version__, np.__version__)
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the kernels' tests run on it")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter already")
@pytest.mark.skipif(NO_INTERPRETER is not None, reason=str(NO_INTERPRETER))
def test_kernels_under_the_interpreter() -> None:
    files = ["tests/kernels/test_lowdim_kernel.py", "tests/kernels/test_decoder_kernel.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_package_works_without_triton() -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"  # import triton raises ImportError
        "import torch, megatron_lpa.model.transformer, megatron_lpa.kernels.tiles\n"
        "from megatron_lpa.ops.products import lowdim_linear\n"
        "x, a, b = torch.randn(3, 8), torch.randn(2, 8), torch.randn(5, 2)\n"
        "for path in ('auto', 'eager', 'joined'):\n"
        "    torch.testing.assert_close(lowdim_linear(x, a, b, path=path), x @ a.T @ b.T)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
