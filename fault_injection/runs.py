"""The command line of a run, the data it reads, and the undisturbed runs that others are compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fault_injection.plan import INTERVAL, KEPT, Layout, Scenario
from fault_injection.processes import Ranks
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter

CONFIG = Path(__file__).parent / "model.yaml"
REFERENCE_S = 180


def make_data(folder: Path) -> None:
    """A dataset whose next token depends on the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "data", np.uint16) as writer:
        for _ in range(400):
            writer.add_document((np.cumsum(draw.integers(1, 4, size=40)) % 97).astype(np.uint16))


def arguments(scenario: Scenario, layout: Layout, data: Path, run_dir: Path, name: str) -> list[str]:
    """Options of ``megatron_lpa.pretrain``."""
    return [
        "--config", str(CONFIG), "--data.prefix", str(data / "data"), "--logging.run_dir", str(run_dir),
        "--logging.name", name, "--train.steps", str(scenario.steps), "--train.checkpoint_interval", str(INTERVAL),
        "--train.keep_checkpoints", str(KEPT), "--train.checkpoint_overlap", str(scenario.overlap).lower(),
        "--train.on_checkpoint_failure", scenario.on_failure,
        "--train.step_timeout_s", str(scenario.step_timeout_s), *layout.arguments(),
    ]  # fmt: skip


class References:
    """Undisturbed runs, made when first asked for.

    Args:
        folder: for data and runs.
        fresh: as ``Ranks``.
    """

    def __init__(self, folder: Path, fresh: bool) -> None:
        self.data, self._folder, self._fresh = folder / "data", folder / "references", fresh
        self._known: dict[str, Path] = {}
        make_data(self.data)

    def of(self, scenario: Scenario) -> Path:
        """The run folder.

        Raises:
            RuntimeError: it did not end as it should.
        """
        nan = sorted(scenario.nan_batches.items())
        words = f"{scenario.layout}, {scenario.steps} steps, {nan}"
        if words not in self._known:
            name = f"run_{len(self._known) + 1}"
            options = arguments(scenario, scenario.layout, self.data, self._folder, name)
            # Of all that an undisturbed run could have, it has the simplest.
            options += ["--train.checkpoint_overlap", "false"]
            specs = [nan_spec(scenario, rank) for rank in range(scenario.layout.processes)]
            ranks = Ranks(options, specs, self.data, self._folder / "logs" / name, self._fresh)
            try:
                for _ in range(REFERENCE_S * 10):
                    ranks.events(0.1)
                    if not ranks.alive:
                        break
            finally:
                ranks.close()
            if set(ranks.codes.values()) != {0}:
                raise RuntimeError(
                    f"the undisturbed run of {words} ended with {sorted(ranks.codes.items())}; look into {ranks.logs}"
                )
            self._known[words] = self._folder / name
        return self._known[words]


def nan_spec(scenario: Scenario, rank: int) -> dict[str, object]:
    """For ``rank.Places``: where this rank's gradient is not a number."""
    return {"nan": [batch for batch, of_rank in scenario.nan_batches.items() if of_rank == rank]}
