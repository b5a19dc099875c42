"""``train.predict_next_block=false``: the loss of the paper's public code, whose labels lie inside each
block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from distributed.test_engine import OPTIM, batches, run_config
from support import reference
from support.models import MODELS
from support.world import groups_for

from megatron_lpa.config import RunConfig, TrainConfig
from megatron_lpa.model.init import initialize
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.parallel.groups import ParallelGroups


def a_step(config: RunConfig) -> tuple[float, float, list[float]]:
    """Loss and gradient norm of a step on half of a batch each, and the evaluated losses afterwards."""
    from megatron_lpa.engine.build import build_engine

    engine = build_engine(config, groups_for(1))
    rows = batches(config.model)[0].chunk(2)[engine.groups.dp_rank].split(config.train.micro_batch_size)
    result = engine.train_step(list(rows), [0] * engine.micro_steps, OPTIM.lr)
    evaluated = engine.losses(batches(config.model)[1])
    loss, norm = float(engine.mean_over_replicas(result.loss)), float(result.grad_norm)
    engine.destroy()
    assert evaluated.shape[1] == config.model.sequence_length - 1
    return loss, norm, evaluated.mean(dim=1).tolist()


@pytest.mark.parametrize(("zero", "loss"), [("zero1", "whole"), ("zero3", "chunked")])
def test_the_loss_is_that_of_labels_shifted_inside_each_block(world, zero, loss):
    model = MODELS["s1_lpa"]
    run = run_config(model, 1, "latent", zero, predict_next_block=False)
    found = world(2).run(a_step, replace(run, kernels=replace(run.kernels, loss=loss)))

    decoder = Decoder(model, ParallelGroups.single())
    initialize(decoder, model, ParallelGroups.single(), TrainConfig().seed)
    weights = {n: p.detach().double().requires_grad_() for n, p in decoder.named_parameters()}
    # A block is S tokens; S - 1 of them are predicted, and no token of another block is looked at.
    block, next_block = (ids[:, :-1] for ids in batches(model)[:2])
    logits = reference.logits(weights, model, block)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, block[:, 1:].flatten())
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), OPTIM.grad_clip)
    optimizer = torch.optim.AdamW(
        weights.values(), lr=OPTIM.lr, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0
    )
    for parameter in weights.values():
        if parameter.dim() > 1:
            parameter.data.mul_(1 - OPTIM.lr * OPTIM.weight_decay)
    optimizer.step()
    after = reference.token_losses(weights, model, next_block[:, :-1], next_block[:, 1:]).mean(dim=1)
    for step_loss, grad_norm, evaluated in found:
        assert step_loss == pytest.approx(expected.item(), rel=1e-5)
        assert grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert evaluated == pytest.approx(after.tolist(), rel=1e-4)
