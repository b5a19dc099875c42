"""The two references that kernel tests compare with agree."""

from __future__ import annotations

import pytest
import torch
from kernels.lowdim_cases import draw, reference
from kernels.test_lowdim_gpu import exact_on_gpu


@pytest.mark.parametrize("norm", [False, True])
def test_the_reference_on_a_gpu_is_the_formula(norm: bool) -> None:
    """Both take the upstream gradients as they are after their rounding to bf16."""
    problem = draw(torch.bfloat16, (2, 5, 32), 8, [16, 32, 16], norm=norm, head_dim=8 if norm else 0)
    for one, other in zip(exact_on_gpu(problem), reference(problem), strict=True):
        # The eager path's tables of the rotary embedding are fp32.
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6)
