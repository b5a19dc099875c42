"""One optimizer step of a model, in loops that do the same arithmetic.

Weights and activations in bf16; gradients summed, clipped and applied in fp32; AdamW's moments and the master
weights in fp32. That is what the engine does (2 + 4 + 12 bytes per parameter), so a bare loop in plain bf16
would win by leaving work out, and one under autocast would lose by casting every weight on every use.
``bare`` and ``llama`` differ in the model alone, as do ``llama_plain`` and ``official``; ``bare`` and
``engine`` in what steps alone.
"""

from __future__ import annotations

import contextlib
import functools
import unittest.mock
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.official_code import official_model
from benchmarks.step_config import Contender
from megatron_lpa.config import ModelConfig, OptimConfig, RunConfig
from megatron_lpa.errors import UserError
from megatron_lpa.model.dtypes import autocast_dtype, weights_dtype
from megatron_lpa.model.recompute import recompute_for
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.ops.products import keep_partial_sums_in_fp32
from megatron_lpa.parallel.groups import ParallelGroups
from megatron_lpa.parallel.sharding import spec_of

BATCHES = 4
"""Sets of random ids that steps take turns with."""

Losses = Callable[[torch.Tensor], torch.Tensor]
"""Ids (B, S + 1) int64 -> mean loss, 0-d."""


class Loop:
    """A model that can do optimizer steps.

    Args:
        config: what was built.
        step: one optimizer step; returns the mean loss, 0-d, without waiting for the device.
        parameters: number of parameters.
        skipped_steps: how many steps changed nothing, because a gradient was not finite.
    """

    def __init__(
        self,
        config: RunConfig,
        step: Callable[[], torch.Tensor],
        parameters: int,
        skipped_steps: Callable[[], int] = lambda: 0,
    ) -> None:
        self.config, self.step, self.parameters, self.skipped_steps = config, step, parameters, skipped_steps


def build_loop(contender: Contender, device: torch.device) -> Loop:
    """Builds the model on the device with random weights.

    Raises:
        UserError: the configuration cannot be measured.
        ImportError: a package is missing.
    """
    keep_partial_sums_in_fp32()  # as training does
    config = contender.config()
    build = {
        "bare": bare_loop,
        "engine": engine_loop,
        "llama": functools.partial(llama_loop, compiled=True),
        "llama_plain": functools.partial(llama_loop, compiled=False),
        "official": official_loop,
    }[contender.loop]
    return build(config, device, contender.dry)


def random_batches(config: RunConfig, device: torch.device) -> list[list[torch.Tensor]]:
    """``BATCHES`` steps' worth of micro-batches (B, S + 1) of random ids, on the device."""
    generator = torch.Generator().manual_seed(config.train.seed)
    train, model = config.train, config.model
    shape = (train.micro_batch_size, model.sequence_length + 1)
    count = train.global_batch_size // train.micro_batch_size

    def batch() -> torch.Tensor:
        return torch.randint(model.vocab_size, shape, generator=generator).to(device)

    return [[batch() for _ in range(count)] for _ in range(BATCHES)]


def random_values(
    module: nn.Module,
    model: ModelConfig,
    groups: ParallelGroups,
    seed: int,
    writable: Callable[[nn.Parameter], Any] = lambda _: contextlib.nullcontext(),
) -> None:
    """Weights drawn on the device; takes the place of ``model.init.initialize``, which draws a run's exact
    values on the CPU and takes a minute for 3B. Random and not zero: a GPU multiplies zeros faster."""
    for parameter in module.parameters():
        role = spec_of(parameter).role
        with writable(parameter), torch.no_grad():
            if role in ("bias", "norm_bias", "norm_weight"):
                parameter.fill_(1.0 if role == "norm_weight" else 0.0)
            else:
                parameter.normal_(0.0, 0.02)


def random_decoder(config: RunConfig, device: torch.device, precision: str) -> Decoder:
    """A decoder on the device, with weights in the run's precision."""
    groups = ParallelGroups.single()
    with device:
        recompute = recompute_for(config.train.activation_checkpointing)
        decoder = Decoder(
            config.model,
            groups,
            config.parallel.lowdim_layout,
            recompute,
            config.kernels,
            autocast_dtype(precision),
        )
    decoder.to(device, weights_dtype(precision))
    random_values(decoder, config.model, groups, config.train.seed)
    return decoder


class MasterAdamW:
    """PyTorch's fused AdamW on fp32 copies of a module's parameters; of fp32 parameters, on themselves.

    A gradient is added to its fp32 sum, and freed, as soon as backward has finished it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optim: OptimConfig) -> None:
        self.working = list(parameters)
        self.copies = any(p.dtype != torch.float32 for p in self.working)
        self.masters: list[torch.Tensor] = list(self.working)
        if self.copies:
            self.masters = [p.detach().float() for p in self.working]
            for parameter, master in zip(self.working, self.masters, strict=True):
                parameter.register_post_accumulate_grad_hook(
                    lambda p, master=master: _take_gradient(p, master)
                )
        self.clip = optim.grad_clip
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
            weight_decay=optim.weight_decay, fused=True,
        )  # fmt: skip

    def step(self) -> None:
        """Clips, updates, and rounds the masters into the parameters; gradients are gone after it."""
        with torch.profiler.record_function("benchmark optimizer"):
            if self.clip > 0:
                torch.nn.utils.clip_grad_norm_(self.masters, self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.copies:
                with torch.no_grad():
                    torch._foreach_copy_(self.working, self.masters)


def _take_gradient(parameter: torch.Tensor, master: torch.Tensor) -> None:
    gradient = parameter.grad
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.float()
    else:
        master.grad.add_(gradient)
    parameter.grad = None


def plain_loop(config: RunConfig, device: torch.device, module: nn.Module, loss_of: Losses) -> Loop:
    """Loss, backward, ``MasterAdamW``; nothing is read back from the device."""
    optimizer = MasterAdamW(module.parameters(), config.optim)
    batches = random_batches(config, device)
    number = 0

    def step() -> torch.Tensor:
        nonlocal number
        micro_batches = batches[number % len(batches)]
        losses = []
        for ids in micro_batches:
            loss = loss_of(ids)
            (loss / len(micro_batches)).backward()
            losses.append(loss.detach())
        optimizer.step()
        number += 1
        return torch.stack(losses).mean()

    return Loop(config, step, sum(p.numel() for p in module.parameters()))


def bare_loop(config: RunConfig, device: torch.device, dry: bool) -> Loop:
    """Our decoder without DeepSpeed."""
    decoder = random_decoder(config, device, config.train.precision)
    return plain_loop(config, device, decoder, lambda ids: decoder(ids[:, :-1], ids[:, 1:]).mean())


def llama_loop(config: RunConfig, device: torch.device, dry: bool, compiled: bool) -> Loop:
    """``transformers``' Llama with its own loss, under ``torch.compile`` or as it is; a dry run compiles no
    code."""
    import transformers

    model, mode = config.model, config.train.activation_checkpointing
    if mode != "none":
        raise UserError(
            f"train.activation_checkpointing={mode}: Llama's loops keep all activations; choose others"
        )
    shape = transformers.LlamaConfig(
        vocab_size=model.padded_vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_width,
        max_position_embeddings=model.sequence_length,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        attn_implementation="sdpa",
        use_cache=False,
    )
    with device:
        llama = transformers.LlamaForCausalLM(shape)
    llama.to(device, weights_dtype(config.train.precision)).train()
    called = torch.compile(llama, backend="aot_eager" if dry else "inductor") if compiled else llama

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        # Labels that are shifted already: every loop predicts S tokens from S.
        labels = ids[:, 1:].contiguous()
        return called(input_ids=ids[:, :-1], labels=labels, shift_labels=labels).loss

    return plain_loop(config, device, llama, loss_of)


def official_loop(config: RunConfig, device: torch.device, dry: bool) -> Loop:
    """The model of the paper's public code with its own loss, which is of S - 1 labels for S tokens."""
    with device:
        module = official_model(config.model)
    module.to(device, weights_dtype(config.train.precision)).train()

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        return module(input_ids=ids[:, :-1], labels=ids[:, :-1])[0]

    return plain_loop(config, device, module, loss_of)


@contextlib.contextmanager
def annotated_deepspeed() -> Iterator[None]:
    """Puts annotations around what the engine does beside the model, for a profile: its kernels have no
    names."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    from megatron_lpa.engine.stepping import OneReplica

    with contextlib.ExitStack() as patches:
        for owner, method, label in (
            (PartitionedParameterCoordinator, "fetch_sub_module", "parameter gather"),
            (PartitionedParameterCoordinator, "release_sub_module", "parameter gather"),
            (DeepSpeedZeroOptimizer_Stage3, "reduce_ready_partitions_and_remove_grads", "gradient reduction"),
            (DeepSpeedZeroOptimizer_Stage3, "independent_gradient_partition_epilogue", "gradient reduction"),
            (DeepSpeedZeroOptimizer_Stage3, "step", "optimizer"),
            (OneReplica, "update", "optimizer"),
        ):
            patches.enter_context(
                unittest.mock.patch.object(
                    owner, method, _annotated(getattr(owner, method), f"benchmark {label}")
                )
            )
        yield


def _annotated(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(label):
            return function(*args, **kwargs)

    return call


def engine_loop(config: RunConfig, device: torch.device, dry: bool) -> Loop:
    """The engine that training uses, with its DeepSpeed configuration."""
    from megatron_lpa.engine import build
    from megatron_lpa.engine.joining import start_distributed
    from megatron_lpa.planning.parameters import count_parameters

    groups = ParallelGroups.create(1) if torch.distributed.is_initialized() else start_distributed(1)
    with unittest.mock.patch.object(build, "initialize", random_values):
        plain_linear = functional.linear
        engine = build.build_engine(config, groups)
        # ZeRO-3 replaces this function for the whole process. Another loop in it must not run DeepSpeed's.
        engines_linear, functional.linear = functional.linear, plain_linear
    batches = random_batches(config, device)
    number = 0

    def step() -> torch.Tensor:
        nonlocal number
        micro_batches = batches[number % len(batches)]
        samples = range(0, config.train.global_batch_size, config.train.micro_batch_size)
        with unittest.mock.patch.object(functional, "linear", engines_linear):
            result = engine.train_step(micro_batches, list(samples), config.optim.lr)
        number += 1
        return result.loss

    return Loop(config, step, count_parameters(config.model).total, lambda: engine.skipped_steps)
