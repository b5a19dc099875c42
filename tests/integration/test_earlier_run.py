"""Run folders of an earlier version go on: with their recorded settings, and to the losses that were
recorded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from integration.launching import launch, records

from megatron_lpa.config import load_config
from megatron_lpa.train.changes import changed_settings, settings_of

ROOT = Path(__file__).parents[2]
EARLIER = ROOT / "tests/data/earlier_run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What ``EARLIER`` holds, as it was when it was written."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    (tmp_path / "run_folders").rename(tmp_path / "runs")
    return tmp_path


@pytest.mark.parametrize(("name", "rounding"), [("one_process", 1e-6), ("two_processes", 1e-3)])
def test_a_run_goes_on_from_its_checkpoint_as_it_did_then(folder: Path, name: str, rounding: float) -> None:
    """Another processor rounds otherwise. The second run computes in bf16, with tensor parallelism."""
    run = folder / "runs" / name
    shutil.rmtree(run / "checkpoints/step_00000006")
    then = {kind: records(run, kind) for kind in ("train", "valid", "test")}
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    processes = recorded["parallel"]["tensor_parallel_size"]
    finished = launch(["--config", f"runs/{name}/config.yaml"], processes, folder)
    assert finished.codes == [0] * processes, finished.stderr
    assert f"resuming from runs/{name}/checkpoints/step_00000003 at step 3" in finished.stdout[0]
    assert "since step_00000003" not in finished.stdout[0]  # no setting has changed
    written = yaml.safe_load((run / "config.yaml").read_text())
    recorded["parallel"]["lowdim_layout"] = written["parallel"]["lowdim_layout"]  # has another name today
    for section, settings in recorded.items():
        assert settings.items() <= written[section].items()
    for kind, known in then.items():
        found = records(run, kind)
        assert [record["step"] for record in found] == [record["step"] for record in known]
        assert [record["loss"] for record in found] == pytest.approx([r["loss"] for r in known], rel=rounding)
        assert [record["time"] != old["time"] for record, old in zip(found, known, strict=True)] == [
            record["step"] > 3 for record in found
        ]  # written anew


@pytest.mark.parametrize(
    ("name", "then", "today"), [("one_process", "latent", "latent"), ("two_processes", "rank", "column_row")]
)
def test_recorded_settings_are_those_of_the_checkpoints(
    folder: Path, name: str, then: str, today: str
) -> None:
    run = folder / "runs" / name
    config = load_config(["--config", str(run / "config.yaml")])
    assert config.parallel.lowdim_layout == today
    for checkpoint in sorted((run / "checkpoints").iterdir()):
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        assert manifest["config"]["parallel"]["lowdim_layout"] == then
        earlier = settings_of(manifest["config"], checkpoint.name)
        assert earlier is not None and changed_settings(earlier, config) == []


def test_conversion_takes_the_earlier_name_of_a_layout(folder: Path) -> None:
    tool = ROOT / "tools/convert_checkpoint.py"
    for name, layout in (("earlier", "rank"), ("today", "column_row")):
        options = ["--output", name, "--lowdim-layout", layout, "--step", "3"]
        done = subprocess.run(
            [sys.executable, tool, "runs/two_processes", *options], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == 0 and "column_row" in done.stdout, done.stderr
    manifests = [json.loads((folder / name / "manifest.json").read_text()) for name in ("earlier", "today")]
    assert manifests[0] == manifests[1] and manifests[0]["layout"]["lowdim_layout"] == "column_row"
