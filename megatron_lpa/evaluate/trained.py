"""A finished or running training run, opened for use in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lpa.checkpoint.manifest import complete_checkpoints, described, read_manifest, verify_files
from megatron_lpa.checkpoint.weights import load_decoder
from megatron_lpa.config import RunConfig, load_config
from megatron_lpa.config.kernels import anywhere
from megatron_lpa.data.tokenizers.opening import Tokenizer, load_tokenizer
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.files import exists, is_dir
from megatron_lpa.model.dtypes import autocast_dtype, weights_dtype
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.ops.products import keep_partial_sums_in_fp32
from megatron_lpa.run_folder import CHECKPOINTS, CONFIG, MANIFEST, TOKENIZER, step_of


@dataclass(frozen=True)
class RecordedRun:
    """What a run folder says of a trained model, without the weights.

    Args:
        config: the run's resolved configuration.
        tokenizer: None when the run recorded none and none was given.
        folder: the run folder.
        manifest: what the checkpoint says about itself.
    """

    config: RunConfig
    tokenizer: Tokenizer | None
    folder: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class TrainedRun(RecordedRun):
    """A trained model with what is needed to use it.

    Args:
        decoder: in eval mode, in the run's precision, on the GPU if there is one.
        step: optimizer steps that made these weights.
    """

    decoder: Decoder
    step: int


def load_run(run: str | Path, step: int | None = None, tokenizer: str | None = None) -> TrainedRun:
    """Open a run without a process group and without DeepSpeed.

    Args:
        run: a run folder, or one of its checkpoint folders.
        step: which checkpoint of a run folder; None takes the newest complete one.
        tokenizer: use this one, not the run's; see ``load_tokenizer``.

    Raises:
        UserError: no such folder or step, no complete checkpoint, damaged files, or a tokenizer that is
            gone or has more ids than the model.
        TryAgain: the disk does not give a file.
    """
    keep_partial_sums_in_fp32()
    folder, checkpoint = find_checkpoint(Path(run), step)
    config = read_config(folder)
    manifest = read_manifest(checkpoint, under="weights/")
    # The tokenizer first: a wrong path should not cost the time of loading a large model.
    loaded = _tokenizer_of(config, folder, tokenizer)
    names = [name for name in manifest["files"] if name.startswith("weights/")]
    verify_files(checkpoint, manifest, names)
    decoder = load_decoder(
        checkpoint / "weights",
        config.model,
        weights_dtype(config.train.precision),
        anywhere(config.kernels),
        listed={name.removeprefix("weights/") for name in names},
        autocast=autocast_dtype(config.train.precision),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return TrainedRun(config, loaded, folder, manifest, decoder.to(device), manifest["progress"].step)


def recorded_run(folder: Path, step: int | None = None) -> RecordedRun:
    """What a run folder says of its newest checkpoint. Of the checkpoint only the manifest is read.

    Raises:
        UserError, TryAgain: as :func:`load_run`, but for damaged weights.
    """
    folder, checkpoint = find_checkpoint(folder, step)
    config = read_config(folder)
    return RecordedRun(
        config, _tokenizer_of(config, folder, None), folder, described(checkpoint, complete=False)
    )


def find_checkpoint(path: Path, step: int | None = None) -> tuple[Path, Path]:
    """``(run folder, checkpoint folder)`` of a path that names either.

    Raises:
        UserError, TryAgain: as :func:`load_run`.
    """
    if not is_dir(path):
        raise UserError(f"{path}: no such folder; give a run folder such as runs/tiny-lpa")
    if exists(path / MANIFEST):
        if step is not None:
            raise UserError(f"{path} is one checkpoint already; leave --step out, or give the run folder")
        above = path.resolve().parents
        if len(above) < 2:
            raise UserError(
                f"{path}: a checkpoint outside of a run folder, whose {CONFIG} is needed too; move it to "
                "RUN/checkpoints, beside that file"
            )
        return above[1], path
    complete = complete_checkpoints(path / CHECKPOINTS)
    if not complete:
        raise UserError(
            f"{path}/checkpoints holds no complete checkpoint (a step_NNNNNNNN folder with {MANIFEST}); "
            "train until one is written, or give another folder"
        )
    if step is None:
        return path, complete[-1]
    steps = {step_of(found): found for found in complete}
    if step not in steps:
        raise UserError(
            f"{path} holds no complete checkpoint of step {step}; it has {', '.join(map(str, steps))}"
        )
    return path, steps[step]


def read_config(folder: Path) -> RunConfig:
    """The configuration that a run folder records.

    Raises:
        UserError: there is none, or it is no configuration.
        TryAgain: the disk does not give it.
    """
    path = folder / CONFIG
    if not exists(path):
        raise UserError(f"{path}: no such file; {folder} is not a run folder, or was copied without it")
    return load_config(["--config", str(path)])


def required_tokenizer(run: RecordedRun) -> Tokenizer:
    """The run's tokenizer.

    Raises:
        UserError: it has none.
    """
    if run.tokenizer is None:
        raise UserError(
            f"{run.folder / CONFIG}: data.tokenizer is empty, so text cannot be read or written; give "
            "--tokenizer"
        )
    return run.tokenizer


def _tokenizer_of(config: RunConfig, folder: Path, override: str | None) -> Tokenizer | None:
    recorded = config.data.tokenizer
    if override is None and recorded is None:
        return None
    if override is not None:
        tokenizer = load_tokenizer(override)
    else:
        assert recorded is not None
        try:
            tokenizer = load_tokenizer(_recorded_tokenizer(recorded, config, folder))
        except TryAgain:
            raise
        except UserError as error:
            raise UserError(
                f"{folder / CONFIG}: data.tokenizer cannot be used: {error}; give --tokenizer"
            ) from error
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids but the model of {folder} knows "
            f"{config.model.vocab_size}; give the one it was trained with: --tokenizer"
        )
    return tokenizer


def _recorded_tokenizer(recorded: str, config: RunConfig, folder: Path) -> str:
    """The copy that the run keeps; without it, the recorded name."""
    copy = folder / TOKENIZER
    return str(copy) if is_dir(copy) else found_again(recorded, config, folder)


def found_again(recorded: str, config: RunConfig, folder: Path, suffix: str = "") -> str:
    """A path of a run's configuration as it is to be given from here.

    A relative path is relative to where training was started, which the run folder's place tells.

    Args:
        recorded: the path.
        config: of the run.
        folder: of the run.
        suffix: of the file that is there, if the path is a prefix.

    Raises:
        UserError: a path may not be looked at.
        TryAgain: the disk does not answer.
    """
    if exists(f"{recorded}{suffix}") or config.logging.name is None:
        return recorded
    run = Path(config.logging.run_dir) / config.logging.name
    here = folder.resolve()
    if here.parts[-len(run.parts) :] == run.parts:
        there = Path(*here.parts[: -len(run.parts)]) / recorded
        if exists(f"{there}{suffix}"):
            return str(there)
    return recorded
