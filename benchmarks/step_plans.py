"""Which plan the low-dimensional modules of a model were really computed by."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator

import torch

from megatron_lpa.ops import products
from megatron_lpa.ops.dispatch import Case, Plan


@contextlib.contextmanager
def recorded_plans() -> Iterator[dict[str, str]]:
    """A dictionary that fills while steps run: kind of module -> path and tiles. Empty for dense models."""
    plans: dict[str, str] = {}
    plan_of = products.plan_of

    def noted(path: str, case: Case, tokens: int, device: torch.device) -> Plan:
        plan = plan_of(path, case, tokens, device)
        kind = f"{len(case.ranks)} pairs, d {case.d_in}, r {case.ranks[0]}"
        plans[f"{kind}, {'training' if case.training else 'forward'}"] = " ".join(filter(None, plan))
        return plan

    with unittest.mock.patch.object(products, "plan_of", noted):
        yield plans
