"""The command line of a run, the data it reads, and the undisturbed runs that others are compared with."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from fault_injection.fault_plan import INTERVAL, KEPT, Layout, Scenario
from fault_injection.launches import Ranks
from megatron_lpa.data.storage.checksums import block_digests
from megatron_lpa.data.storage.dataset_manifest import Checksums, Manifest, TokenizerRecord, write_manifest
from megatron_lpa.data.storage.indexed import bin_path, idx_path
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter

CONFIG = Path(__file__).parent / "model.yaml"
DOCUMENTS, DOCUMENT_TOKENS, VOCABULARY = 400, 40, 97

REFERENCE_S = 180

PATIENT_S = 90.0
"""As ``train.step_timeout_s`` where nothing is going to hang."""

STEP_LIMIT_S = 4.0
START_LIMIT_S = 8.0
"""As ``train.step_timeout_s`` and ``train.start_timeout_s`` where something is."""


def make_data(folder: Path) -> None:
    """A dataset whose next token depends on the last one, and another one in ``other/``."""
    for number, name in enumerate(("data", "other/data")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw = np.random.default_rng(number)
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for _ in range(DOCUMENTS):
                steps = draw.integers(1, 4, size=DOCUMENT_TOKENS)
                writer.add_document((np.cumsum(steps) % VOCABULARY).astype(np.uint16))
        tokens = DOCUMENTS * DOCUMENT_TOKENS
        checksums = Checksums(
            [*block_digests(bin_path(folder / name))], [*block_digests(idx_path(folder / name))]
        )
        tokenizer = TokenizerRecord("none", "0" * 64, VOCABULARY, None)
        write_manifest(
            folder / name,
            Manifest(
                DOCUMENTS,
                tokens,
                0,
                0,
                0,
                tokens,
                DOCUMENTS,
                "uint16",
                "text",
                False,
                tokenizer,
                checksums,
                [],
            ),
        )


def arguments(
    scenario: Scenario, layout: Layout, data: Path, run_dir: Path, name: str, kinds: Collection[str] = ()
) -> list[str]:
    """Options of ``megatron_lpa.pretrain``.

    Args:
        scenario: of the run.
        layout: of this start.
        data: folder that ``make_data`` filled.
        run_dir: as ``logging.run_dir``.
        name: as ``logging.name``.
        kinds: of the faults that are to strike; where a hang is among them, time is up sooner.
    """
    options = [
        "--config", str(CONFIG), "--data.prefix", str(data / "data"), "--logging.run_dir", str(run_dir),
        "--logging.name", name, "--train.steps", str(scenario.steps), "--train.checkpoint_interval",
        str(INTERVAL),
        "--train.keep_checkpoints", str(KEPT), "--train.checkpoint_overlap", str(scenario.overlap).lower(),
        "--train.on_checkpoint_failure", scenario.on_failure,
        "--train.max_skipped_steps", str(scenario.max_skipped),
        "--train.step_timeout_s", str(STEP_LIMIT_S if "stop-for-ever" in kinds else PATIENT_S),
        *layout.arguments(scenario.micro_batch),
    ]  # fmt: skip
    if "hang-start" in kinds:
        options += ["--train.start_timeout_s", str(START_LIMIT_S)]
    return options


class References:
    """Undisturbed runs, made when first asked for, by whichever worker asks.

    Args:
        folder: for data and runs.
        fresh: as ``Ranks``.
    """

    def __init__(self, folder: Path, fresh: bool) -> None:
        self.data, self._folder, self._fresh = folder / "data", folder / "references", fresh
        self._folder.mkdir()
        make_data(self.data)

    def of(self, scenario: Scenario) -> Path:
        """The run folder.

        Raises:
            RuntimeError: it did not end as it should.
        """
        nan = sorted(scenario.nan_batches.items())
        words = (
            f"{scenario.layout}, {scenario.steps} steps, {scenario.micro_batch}, {scenario.max_skipped}, "
            f"{nan}"
        )
        name = f"run_{hashlib.sha256(words.encode()).hexdigest()[:16]}"
        done = self._folder / f"{name}.done"
        with open(self._folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                self._make(scenario, name)
                done.touch()
        return self._folder / name

    def _make(self, scenario: Scenario, name: str) -> None:
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
                f"the undisturbed run of {scenario} ended with {sorted(ranks.codes.items())}; look into "
                f"{ranks.logs}"
            )


def nan_spec(scenario: Scenario, rank: int) -> dict[str, object]:
    """For ``rank.Places``: where this rank's gradient is not a number."""
    return {"nan": [batch for batch, of_rank in scenario.nan_batches.items() if of_rank == rank]}
