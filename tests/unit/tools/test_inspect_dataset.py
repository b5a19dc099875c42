"""``tools/inspect_dataset.py`` as a user meets it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.token_datasets import random_documents, write_dataset

from megatron_lpa.commands import inspect_dataset
from megatron_lpa.data.storage.dataset_manifest import TokenizerRecord
from megatron_lpa.data.tokenizers.opening import load_tokenizer
from megatron_lpa.preparation.bpe import train_tokenizer

TOOL = Path(__file__).parents[3] / "tools" / "inspect_dataset.py"
TEXT = "Is it \x1b[31mred\x07?\n" * 3 + "é 日本"


@pytest.fixture
def tokenized(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT * 50)
    train_tokenizer([str(tmp_path / "text.txt")], 270, str(tmp_path / "tokenizer"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    record = TokenizerRecord(str(tmp_path / "tokenizer"), tokenizer.fingerprint, tokenizer.vocab_size, 0)
    documents = [[5, 0], [*tokenizer.encode(TEXT), 0]]
    return write_dataset(tmp_path / "d", documents, change=lambda m: replace(m, tokenizer=record))


def test_from_a_shell_without_torch(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(0, 30))
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:];\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0 and 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(TOOL), str(prefix), "--verify"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{prefix}\n  documents") and done.stdout.endswith(
        "verified: no problems\n"
    )


def test_text_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = str(write_dataset(tmp_path / "d", random_documents(0, 30)))
    assert inspect_dataset.main([prefix]) == 0
    text = capsys.readouterr().out
    assert "tokens per document" in text and "Pile-CC" in text and "d.a.jsonl" in text and "####" in text
    assert inspect_dataset.main([prefix, "--json", "--verify", "--document", "-1"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["documents"] == 30
    assert content["document"]["ids"] == random_documents(0, 30)[-1]
    assert content["verification"] == {"problems": [], "unlisted": {}, "unchecked": []}


def test_documents_and_their_text(tokenized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_dataset.main([str(tokenized), "--document", "-1"]) == 0
    out, err = capsys.readouterr()
    assert "document 1: " in out and err == ""
    assert out.endswith("Is it \\x1b[31mred\\x07?\né 日本<|endoftext|>\n")  # no commands to the terminal
    assert inspect_dataset.main([str(tokenized), "--document", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["document"]["text"] == TEXT + "<|endoftext|>"
    Path(f"{tokenized}.json").unlink()
    assert inspect_dataset.main([str(tokenized), "--document", "0"]) == 0
    out, err = capsys.readouterr()
    assert "\n5 0\n" in out and err.startswith("note: no manifest")


def test_the_histogram_is_a_png(tmp_path: Path) -> None:
    prefix = str(write_dataset(tmp_path / "d", random_documents(0, 30)))
    assert inspect_dataset.main([prefix, "--histogram", str(tmp_path / "h.png")]) == 0
    raw = (tmp_path / "h.png").read_bytes()
    assert raw.startswith(b"\x89PNG\r\n\x1a\n") and 5_000 < len(raw) < 500_000
    width, height = struct.unpack(">II", raw[16:24])
    assert 800 <= width <= 4000 and 500 <= height <= 2000


def test_damage_is_printed_and_the_exit_code_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(0, 30), block_bytes=64)
    path = Path(f"{prefix}.bin")
    raw = bytearray(path.read_bytes())
    raw[101] = 255  # an id of 65280 and more
    path.write_bytes(raw)
    assert inspect_dataset.main([str(prefix), "--verify"]) == 78
    out = capsys.readouterr().out
    assert f"{path}: bytes 64 to 127: block 1 does not have the recorded SHA-256" in out
    assert f"{path}: bytes 100 to 101: token 50 of document " in out
    assert out.endswith("verified: 2 problems\n")
    path.write_bytes(raw[:-7])
    assert inspect_dataset.main([str(prefix), "--verify", "--json"]) == 78
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    problems = json.loads(out)["verification"]["problems"]
    assert {"length", "checksum"} <= {problem["kind"] for problem in problems}
    assert {problem["path"] for problem in problems} == {str(path)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "x"], "--tokenizer is for --document"),
        (["--histogram", "h.pdf"], "only PNG is written"),
        (["--document", "30"], "has no document 30; give 0 to 29"),
        (["--document", "-31"], "has no document -31"),
        (["--document", "0", "--tokenizer", "/none/x.json"], "no such tokenizer file"),
    ],
)
def test_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(0, 30))
    assert inspect_dataset.main([str(prefix), *options]) == 78
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err
    assert inspect_dataset.main([str(tmp_path / "none"), *options]) == 78


@pytest.mark.parametrize("options", [[], ["--verify"]])
def test_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert inspect_dataset.main([str(tmp_path / "none"), *options]) == 78
    assert "none.idx: no such file; give the prefix" in capsys.readouterr().err
