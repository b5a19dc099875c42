"""Kinds of faults: how often each comes, when it strikes, and what sorts of it there are."""

from __future__ import annotations

from megatron_lpa.run_folder import (
    CHECKPOINTS,
    CONFIG,
    LOCK,
    LOGS,
    METRICS,
    PASSED_OVER,
    TOKENIZER,
    checkpoint_name,
)

SHARES = {
    "kill-one": 22, "kill-all": 14, "kill-random": 24, "kill-in-save": 36, "kill-in-load": 6, "signal": 16,
    "signal-twice": 8, "pause": 12, "stop-for-ever": 3, "damage": 30, "all-damaged": 3, "disk-full": 10,
    "read-error": 6, "read-error-lasting": 4, "nan": 8, "clock": 10, "layout": 8, "rank-mismatch": 24,
    "open-error": 30, "open-error-lasting": 8, "stop-between-bad": 12, "link": 30, "pipe": 12,
    "malformed": 24,
    "hang-start": 3,
}  # fmt: skip
"""How often each kind comes for 363 faults."""

ENDING = {
    "kill-one", "kill-all", "kill-random", "kill-in-save", "kill-in-load", "signal", "signal-twice",
    "stop-for-ever", "read-error", "read-error-lasting", "open-error-lasting", "stop-between-bad",
    "hang-start",
}  # fmt: skip
"""End the run, so that it is started again."""

BETWEEN = {"damage", "malformed", "all-damaged", "layout", "rank-mismatch", "link", "pipe"}
"""Happen between two starts."""

STOPPING = {"signal", "signal-twice", "stop-between-bad"}
"""A signal that a run answers: its code is that of ``Fault.variant``, and no step is lost."""

BEFORE_TRAINING = {"kill-random", "kill-in-load", "open-error", "open-error-lasting", "hang-start"}
"""May strike before the first step of a start."""

RESTARTED = ENDING | BETWEEN
"""Have another start behind them."""

RANK_0_SITES = ("weights-torn", "manifest", "manifest-torn", "before-rename", "after-rename", "removing")
SITES = ("before-state", "state-torn", *RANK_0_SITES)
"""Places inside a save, in their order."""

DAMAGES = (
    "truncated", "bit-flipped", "missing", "empty", "manifest-flipped", "manifest-empty", "manifest-missing",
    "half-copied", "deleted",
)  # fmt: skip

OPENED = ("idx", "bin", "data-manifest", "config", "manifest", "state", "weights")
"""What a disk does not give when it is opened or read: the data's files, the config, the newest checkpoint's
files."""

OF_CHECKPOINT = ("manifest", "state", "weights")
"""Those of ``OPENED`` for which there has to be a checkpoint."""

ERRORS = ("ESTALE", "EIO", "EMFILE")
"""What it says, in turn."""

MISMATCHES = {
    "lr": ("optim.lr", "3e-3"),
    "seed": ("train.seed", "77"),
    "data": ("data.prefix", "other/data"),
    "split": ("data.split", "80,20,0"),
    "dropout": ("model.dropout", "0.2"),
    "sequence-length": ("model.sequence_length", "8"),
    "heads": ("model.num_heads", "2"),
    "batch": ("train.global_batch_size", "16"),
    "micro-batch": ("train.micro_batch_size", "1"),
    "layers": ("model.num_layers", "2"),
    "zero": ("train.deepspeed_config", ""),
    "precision": ("train.precision", ""),
    "tensor-parallel": ("parallel.tensor_parallel_size", ""),
    "steps": ("train.steps", "17"),
    "interval": ("train.checkpoint_interval", "4"),
    "skipped": ("train.max_skipped_steps", "4"),
}  # fmt: skip
"""Options that one rank is given another value of: the key, and the value, "" where it depends on the
layout."""

LINKED_FILES = (
    LOCK, METRICS, CONFIG, f"{CHECKPOINTS}/{PASSED_OVER}", "metrics.partial",
    f".{METRICS}.partial", f".{CONFIG}.partial", f"{CHECKPOINTS}/.{PASSED_OVER}.partial",
)  # fmt: skip
LINKED_FOLDERS = (CHECKPOINTS, LOGS, TOKENIZER, f"{CHECKPOINTS}/.{checkpoint_name(99)}.partial")
LINKS = (
    *(f"symbolic {name}" for name in LINKED_FILES),
    *(f"folder {name}" for name in LINKED_FOLDERS),
    *(f"hard {name}" for name in LINKED_FILES),
    *(f"dangling {name}" for name in LINKED_FILES),
)
"""A sort of link and the name in a run folder at which it is planted."""

MAY_STAY = {
    *(f"{sort} {name}" for sort in ("symbolic", "hard", "dangling")
      for name in ("metrics.partial", f"{CHECKPOINTS}/.{PASSED_OVER}.partial")),
    f"hard {CHECKPOINTS}/{PASSED_OVER}",
}  # fmt: skip
"""Links that a run may leave alone: at a name that it never writes, or writes only when it goes back."""

PIPES = ("config", "data-manifest", METRICS, "manifest", CONFIG, "state", LOCK, "weights")
"""Where a named pipe lies in place of a file: given to the command, in the run folder, or in its newest
checkpoint."""

MALFORMED = (
    "files-null", "files-list", "files-empty", "bytes-text", "bytes-infinite", "hash-number", "name-outside",
    "progress-missing", "progress-negative", "progress-true", "state-missing", "optimizer-step-text",
    "layout-null",
    "tensor-parallel-huge", "model-list", "order-missing", "parameters-null", "shape-text", "a-list",
)  # fmt: skip
"""What a manifest says that is sealed like a good one."""
