"""What whole runs are started in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a dataset whose next token depends on the last one, so that there is something to
    learn."""
    folder = tmp_path_factory.mktemp("runs")
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "data", np.uint16) as writer:
        for _ in range(200):
            steps = generator.integers(1, 4, size=40)
            writer.add_document((np.cumsum(steps) % 97).astype(np.uint16))
    return folder
