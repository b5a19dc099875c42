"""Random numbers that depend on what is computed, never on where.

Initial weights depend on the seed and the parameter's name. Dropout depends on the seed and the first
sample of the micro-batch, so all ranks of a tensor-parallel group draw the same masks, replicas draw
different ones, and a resumed run draws what the undisturbed run would have drawn: no RNG state to save.
"""

from __future__ import annotations

import hashlib

import torch


def stable_seed(*parts: int | str) -> int:
    """A 63-bit seed from parts, equal on every machine and Python version."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the initial value of the parameter called ``name``."""
    return torch.Generator().manual_seed(stable_seed("init", seed, name))


def seed_dropout(seed: int, first_sample: int) -> None:
    """Seed the default generators for the micro-batch that starts with sample ``first_sample``."""
    torch.manual_seed(stable_seed("dropout", seed, first_sample))
