"""What ``slurm/common.sh`` itself writes and removes, and where; needs no SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COMMON = REPOSITORY / "slurm" / "common.sh"


def bash(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run lines after ``common.sh``, in a folder whose ``run`` is the run folder."""
    return subprocess.run(
        ["bash", "-c",
        f'set -euo pipefail; source "$1"; run=run python=("{sys.executable}") restarts=0 first_step=4 max_idle=3; {script}', "script", str(COMMON)],  # noqa: E501
        cwd=folder, env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "HOME": str(folder / "home"),
        "PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True, text=True, timeout=20,
    )  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A run folder, and a file that is somebody else's."""
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("theirs\n")
    return tmp_path


def plant(path: Path, kind: str, theirs: Path) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "hard link":
        os.link(theirs / "file", path)
    elif kind == "file":
        path.write_text("7 4 9\n")
    else:
        path.symlink_to(
            {"link": theirs / "file", "link to a folder": theirs, "dangling": theirs / "new"}[kind]
        )


KINDS = ["link", "link to a folder", "dangling", "hard link", "fifo", "file"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["idle_starts", "idle_starts.partial"])
def test_the_count_of_idle_starts_is_written_in_the_run_folder_alone(
    site: Path, name: str, kind: str
) -> None:
    plant(site / "run" / "logs" / name, kind, site / "theirs")
    done = bash("count_idle_starts", site)
    assert done.returncode == 0, done.stderr
    counted = 10 if (name, kind) == ("idle_starts", "file") else 0
    written = site / "run" / "logs" / "idle_starts"
    assert not written.is_symlink() and written.read_text() == f"7 4 {counted}\n"
    assert [path.name for path in written.parent.iterdir()] == ["idle_starts"]
    assert [path.name for path in (site / "theirs").iterdir()] == ["file"]
    assert (site / "theirs" / "file").read_text() == "theirs\n"


def test_a_folder_in_place_of_the_count_ends_the_job(site: Path) -> None:
    (site / "run" / "logs" / "idle_starts").mkdir()
    done = bash("count_idle_starts", site)
    assert done.returncode == 1
    assert done.stderr.endswith("error: run/logs/idle_starts cannot be written\n")


@pytest.mark.parametrize(
    ("content", "counted"),
    [("7 4 2", 3), ("7 04 08", 9), ("8 4 2", 0), ("7 3 2", 0), ("7 4", 0), ("7 4 x", 0), (f"7 4 {'9' * 30}",
    0), ("7 4 a[$(x)]", 0)],
)  # fmt: skip
def test_what_a_count_of_idle_starts_may_say(site: Path, content: str, counted: int) -> None:
    (site / "run" / "logs" / "idle_starts").write_text(f"{content}\n")
    done = bash('count_idle_starts; echo "$idle_starts"', site)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{counted}\n", "")


def test_the_newest_step_is_that_of_a_checkpoint(site: Path) -> None:
    for name in ("step_00000008", "step_00000012_backup", "step_9", f"step_{'9' * 30}"):
        (site / "run" / "checkpoints" / name).mkdir(parents=True)
        (site / "run" / "checkpoints" / name / "manifest.json").touch()
    assert bash("newest_step", site).stdout == "8\n"


@pytest.mark.parametrize("kind", ["nothing", "folder", *KINDS])
def test_the_logs_of_a_start_are_in_a_new_folder(site: Path, kind: str) -> None:
    """A log that was there already would be appended to, and what it says of the end of training believed."""
    expected = "run/logs/7.0" if kind == "nothing" else "run/logs/7.0.2"
    if kind == "folder":
        (site / "run" / "logs" / "7.0").mkdir()
        (site / "run" / "logs" / "7.0" / "rank_0000.log").write_text("exit code 78: planted\n")
    elif kind != "nothing":
        plant(site / "run" / "logs" / "7.0", kind, site / "theirs")
    done = bash('make_logs; echo "$logs"; if refused; then echo refused; fi', site)
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr
    assert list((site / expected).iterdir()) == []


def test_operators_are_compiled_outside_the_run_folder(site: Path) -> None:
    """What is compiled is run; and a lock of an earlier start of this job would be waited for, for ever."""
    planted = site / "run" / ".extensions" / "cpu_adam"
    own = site / "home" / ".cache" / "megatron_lpa" / "operators-7" / "cpu_adam"
    for folder in (planted, own, own.parents[1] / "operators-8" / "cpu_adam"):
        folder.mkdir(parents=True)
        (folder / "lock").touch()
    done = bash('own_operators; printenv TORCH_EXTENSIONS_DIR; echo "$operators"', site)
    assert done.stdout == f"{own.parent}\n" * 2, done.stderr
    assert [path.exists() for path in (planted / "lock", own / "lock")] == [True, False]
    assert (own.parents[1] / "operators-8" / "cpu_adam" / "lock").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/megatron_lpa/operators-7//caches/megatron_lpa/operators-7"),
        ({"XDG_CACHE_HOME": "caches", "HOME": "/h"},
        "/h/.cache/megatron_lpa/operators-7//h/.cache/megatron_lpa/operators-7"),
        ({"TORCH_EXTENSIONS_DIR": "/mine"}, "/mine/"),
    ],
)  # fmt: skip
def test_where_operators_are_compiled(site: Path, environment: dict[str, str], expected: str) -> None:
    done = bash('own_operators; echo "$TORCH_EXTENSIONS_DIR/$operators"', site, **environment)
    assert done.stdout == f"{expected}\n", done.stderr


def test_without_a_home_the_way_out_is_named(site: Path) -> None:
    done = bash("own_operators", site, HOME="")
    assert (done.returncode, done.stderr) == (2, "error: HOME is not set; set it, or TORCH_EXTENSIONS_DIR\n")
