"""How a model is trained: one frozen dataclass per concern, and ``RunConfig`` that holds them all.

Nothing here is global: a ``RunConfig`` is passed explicitly to whoever needs it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_lpa.config.kernels import KernelConfig
from megatron_lpa.config.model import ModelConfig

EARLIER_LAYOUTS = {"rank": "column_row"}
"""What ``parallel.lowdim_layout`` was called in configurations and checkpoints of earlier versions."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model is spread over processes.

    Args:
        tensor_parallel_size: processes that share one copy of the model. The data-parallel size is
            the world size divided by it.
        lowdim_layout: how low-dimensional modules are split under tensor parallelism; results are
            equal. ``column_row`` splits W_A and W_B along r; ``latent`` exchanges the r-dimensional
            latents instead of activations (docs/architecture.md has the bytes of both).
    """

    tensor_parallel_size: int = 1
    lowdim_layout: Literal["column_row", "latent"] = "latent"


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from. Prefixes name ``<prefix>.bin`` and ``<prefix>.idx``.

    Args:
        prefix: one dataset, cut by ``split`` into train, valid and test by whole documents.
        blend: several datasets and the share of the samples that each gives, as
            ``{"data/a": 0.7, "data/b": 0.3}``; weights need not sum to 1. Each is cut by ``split``.
            Excludes ``prefix`` and ``train_prefix``.
        split: shares of documents for train, valid and test, as ``"969,30,1"``.
        train_prefix: a dataset for training only; excludes ``prefix``.
        valid_prefix: a dataset for validation only, in the order of the file; optional with
            ``train_prefix``.
        test_prefix: a dataset for the final test only, in the order of the file; optional with
            ``train_prefix``.
        shuffle_documents: shuffle documents before they are cut into train, valid and test and packed
            into samples; false keeps the order of the file, so that the last ones are held out.
        document_seed: seed of that shuffle. It is not ``train.seed``, so that runs of several seeds
            hold out the same documents and share one sample index.
        allow_repeats: let a run of ``train.tokens`` read data more than once; without it such a run is
            refused when the data has too few tokens.
        cache_dir: folder for sample indices, which are made at the first start; empty means
            ``<prefix>.cache``, or ``~/.cache/megatron_lpa`` where that cannot be written.
        index_timeout_s: seconds to wait for a sample index that another process makes.
        tokenizer: folder, ``tokenizer.json``, SentencePiece ``.model`` or hub name; recorded with the
            run so that text can be generated and perplexity per word computed. It has to be the one
            that the data was made with.
    """

    prefix: str | None = None
    blend: dict[str, float] | None = None
    split: str = "969,30,1"
    train_prefix: str | None = None
    valid_prefix: str | None = None
    test_prefix: str | None = None
    shuffle_documents: bool = True
    document_seed: int = 1
    allow_repeats: bool = False
    cache_dir: str | None = None
    index_timeout_s: float = 600.0
    tokenizer: str | None = None


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and the learning-rate schedule.

    Args:
        lr: peak learning rate.
        min_lr_ratio: the schedule ends at ``lr * min_lr_ratio``.
        schedule: ``cosine``, ``linear``, ``constant``, or ``wsd`` (warm-up, stable, linear decay).
        warmup_steps: optimizer steps of linear warm-up from 0.
        decay_steps: step at which the schedule reaches its end; empty means the last step.
        wsd_decay_fraction: share of the run that ``wsd`` spends decaying.
        beta1: AdamW's first-moment decay.
        beta2: AdamW's second-moment decay.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay of matrices, embeddings among them.
        decay_biases: decay biases of linears and of the head too.
        decay_norms: decay weights and biases of norms too.
        grad_clip: largest global gradient norm; 0 turns clipping off.
    """

    lr: float = 8e-4
    min_lr_ratio: float = 0.0
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 1000
    decay_steps: int | None = None
    wsd_decay_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    weight_decay: float = 0.0
    decay_biases: bool = False
    decay_norms: bool = False
    grad_clip: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch, precision and cadence of a run. Exactly one of steps, tokens, epochs is set.

    Args:
        steps: optimizer steps.
        tokens: training tokens; rounded up to whole steps.
        epochs: passes over the training split; rounded up to whole steps.
        global_batch_size: sequences per optimizer step over all processes.
        micro_batch_size: sequences per process and forward pass, or fewer where a step has fewer for each;
            gradient accumulation follows.
        precision: ``fp32``; ``bf16`` with fp32 master weights; or ``bf16_mixed``, autocast to bf16 over fp32
            weights: products and attention in bf16, the residual stream, norms and gradients in fp32.
        predict_next_block: whether the last token of each sequence predicts the first one of the next, so
            that a sequence has as many labels as tokens. ``false`` leaves that label out of training and
            validation, as the paper's public code does, which shifts the labels inside each block.
        activation_checkpointing: ``selective`` keeps results of matrix products and attention and recomputes
            the rest of every layer in the backward pass, ``full`` recomputes all of every layer.
        deepspeed_config: a name in ``ds_configs/`` (``zero3``) or the path of such a JSON file.
        seed: seeds initial weights, data order and dropout.
        eval_interval: optimizer steps between validations; 0 turns them off.
        eval_batches: global batches per validation; 0 reads the whole split.
        checkpoint_interval: optimizer steps between checkpoints; 0 saves only at the end.
        keep_checkpoints: newest checkpoints kept, and the newest one written at checkpoint_interval; 0 keeps
            all.
        keep_every: checkpoints whose step is a multiple of this are never removed; 0 turns the rule off.
        keep_best: keep the checkpoint with the lowest validation loss too, of those at whose step
            validation ran.
        max_skipped_steps: a step whose gradient is not finite on some process changes nothing and is counted;
            after this many in a row the run goes back to its newest checkpoint. 0 never goes back.
        loss_spike: go back also when a step's loss is this much (in nats) above the mean of the 50 steps
            before; 0 turns it off. With it every step waits for its loss.
        start_timeout_s: seconds that a process may be in one stage of its start (waiting for other processes,
            opening data, building the model, loading a checkpoint, ...); then it ends the run as
            ``step_timeout_s`` does. 0 waits for ever.
        step_timeout_s: seconds that a process may be in one stage of a step (reading data, computing, writing
            a checkpoint, ...); then it tells where it is, writes the stacks of its threads and ends the run
            with exit code 75. 0 waits for ever.
        lock_wait_s: seconds to wait for a run folder that another run seems to write; empty: 120, and 600
            after a requeue by SLURM.
        max_rollbacks: how often a run may go back, over all its starts; the next time it ends with an error.
        checkpoint_overlap: write checkpoints beside training, from a copy in the CPU's memory; false stops
            training while they are written and needs no copy.
        on_checkpoint_failure: what to do when a checkpoint cannot be written, as on a full disk: ``continue``
            warns, trains on and tries again at the next interval; ``stop`` ends the run. The last checkpoint
            of a run always has to be written. Earlier checkpoints stay usable either way.
        resume: ``auto`` continues from the newest intact checkpoint of the run folder and starts anew only
            where there is none at all, ``never`` refuses a run folder that holds one, ``must`` refuses a run
            folder without one.
    """

    steps: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    global_batch_size: int = 160
    micro_batch_size: int = 8
    precision: Literal["fp32", "bf16", "bf16_mixed"] = "bf16"
    predict_next_block: bool = True
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    deepspeed_config: str = "zero3"
    seed: int = 27
    eval_interval: int = 200
    eval_batches: int = 50
    checkpoint_interval: int = 1000
    keep_checkpoints: int = 3
    keep_every: int = 0
    keep_best: bool = False
    max_skipped_steps: int = 5
    loss_spike: float = 0.0
    max_rollbacks: int = 3
    start_timeout_s: float = 900.0
    step_timeout_s: float = 1800.0
    lock_wait_s: float | None = None
    checkpoint_overlap: bool = True
    on_checkpoint_failure: Literal["continue", "stop"] = "continue"
    resume: Literal["auto", "never", "must"] = "auto"


@dataclass(frozen=True)
class LoggingConfig:
    """What a run writes. ``metrics.jsonl`` in the run folder is the record; the rest are views.

    Args:
        run_dir: folder that holds run folders.
        name: name of the run folder; empty means the preset's name with ``/`` as ``-``.
        interval: optimizer steps between log lines.
        progress_bar: ``auto`` shows one only on a terminal.
        tensorboard: write TensorBoard event files to ``<run folder>/tensorboard``.
        wandb: ``off``, ``offline`` or ``online``.
        wandb_project: W&B project.
        peak_tflops: dense peak of one device for MFU; empty means the known value of the GPU, and
            no MFU on a CPU or an unknown GPU.
    """

    run_dir: str = "runs"
    name: str | None = None
    interval: int = 10
    progress_bar: Literal["auto", "on", "off"] = "auto"
    tensorboard: bool = True
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "megatron_lpa"
    peak_tflops: float | None = None


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
