"""Kinds of structures: what is not registered is refused, wherever it would be built."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.models import SETTING_1

from megatron_lpa.config import ParallelConfig, ProjectionConfig, ProjectionsConfig
from megatron_lpa.errors import UserError
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.planning.flops import flops_per_token_forward
from megatron_lpa.planning.parameters import count_parameters, parameters_per_tensor_rank
from megatron_lpa.planning.traffic import collective_elements_per_token


@pytest.mark.parametrize("side", ["q", "down"])
@pytest.mark.parametrize(
    "use",
    [
        count_parameters,
        flops_per_token_forward,
        lambda model: parameters_per_tensor_rank(model, ParallelConfig(2)),
        lambda model: collective_elements_per_token(model, ParallelConfig(2)),
        lambda model: Decoder(model, ParallelGroups.single()),
    ],
)
def test_an_unknown_kind_passes_for_no_other(use, side) -> None:
    unknown = ProjectionsConfig(**{side: ProjectionConfig("monarch", 8)})
    with pytest.raises(UserError, match="'monarch' is no kind of projection; use one of dense, lowdim"):
        use(replace(SETTING_1, projections=unknown))
