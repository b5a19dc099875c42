"""Unfinished files follow no link to where it leads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_lpa.data.storage.partial_file import PartialFile, write_json


@pytest.mark.parametrize("kind", ["symbolic", "hard", "pipe"])
def test_what_has_the_name_of_an_unfinished_file_is_let_go_of(tmp_path: Path, kind: str) -> None:
    outside, leftover = tmp_path / "outside", tmp_path / "a.json.partial"
    outside.write_text("precious")
    if kind == "symbolic":
        leftover.symlink_to(outside)
    elif kind == "hard":
        os.link(outside, leftover)
    else:
        os.mkfifo(leftover)
    write_json(tmp_path / "a.json", {"a": 1})
    assert outside.read_text() == "precious"
    assert (
        json.loads((tmp_path / "a.json").read_text()) == {"a": 1} and not (tmp_path / "a.json").is_symlink()
    )


def test_a_leftover_of_one_s_own_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_bytes(b"0123456789")
    file = PartialFile.open(tmp_path / "a", keep_bytes=4)
    file.write(b"x")
    file.finish()
    file.publish()
    assert (tmp_path / "a").read_bytes() == b"0123x"
