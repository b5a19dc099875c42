"""A checkpoint that several files of tests convert."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import State, random_checkpoint
from support.models import MODELS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A run folder with one checkpoint, and its state. Nobody changes it."""
    run = tmp_path_factory.mktemp("run")
    return run, random_checkpoint(run / "checkpoints", MODELS["s1_low_all"])
