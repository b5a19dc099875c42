"""Kernel tests run on a GPU, or on the CPU in Triton's interpreter.

Triton reads TRITON_INTERPRET when it is imported, and other tests import it without. So on the CPU
``test_under_interpreter.py`` starts a second pytest for the files below, and this process leaves them alone.
To run one by hand: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_lowdim_kernel.py``.
"""

from __future__ import annotations

import importlib.util
import os

import torch

collect_ignore = []
if importlib.util.find_spec("triton") is None or not (
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
):
    collect_ignore = ["test_lowdim_kernel.py", "test_decoder_kernel.py"]
