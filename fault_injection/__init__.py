"""Fault injection into small training runs: ``python tools/chaos.py --help``.

Not a part of the package that trains: nothing in ``megatron_lpa`` imports or knows of it.
"""

import os

# Before anything imports NumPy or torch, whose threads a forked process would lack.
os.environ.update(
    OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES=""
)
