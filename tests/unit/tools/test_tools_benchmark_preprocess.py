"""``tools/benchmark.py preprocess`` and ``preprocess-memory``, on little text."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import orjson
import pytest
import zstandard

from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter
from megatron_lpa.errors import UserError

pytest.importorskip("megatron.core")
pytest.importorskip("gigatoken")

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "benchmark.py"
TEXTS = [
    f"Report {i}: the naïve committee met {'again ' * (i % 7)}on day {i * i}.\n\tEnd" for i in range(3000)
]
METHOD_NUMBERS = {
    "seconds", "seconds_without_decompression", "seconds_bare", "mb_per_second", "documents_per_second",
    "tokens_per_second", "tokens_per_second_per_core", "peak_memory_mb", "ours_is_faster_by",
    "ours_is_faster_by_bare",
}  # fmt: skip


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))  # the tool puts the repository's root there
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def corpus(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ``.jsonl.zst`` and a small tokenizer."""
    from benchmarks.sample_tokenizers import train_sample_tokenizers

    folder = tmp_path_factory.mktemp("corpus")
    path = folder / "text.jsonl.zst"
    lines = [orjson.dumps({"text": text}) + b"\n" for text in TEXTS]
    half = len(lines) // 2
    frames = [zstandard.compress(b"".join(part)) for part in (lines[:half], lines[half:])]
    path.write_bytes(b"".join(frames))
    return path, train_sample_tokenizers(path, folder)[1]


def test_result_of_all_methods(corpus: tuple[Path, Path], tmp_path: Path) -> None:
    path, tokenizer = corpus
    output = tmp_path / "made" / "result.json"
    command = [sys.executable, TOOL, "preprocess", "--quick", "--input", path, "--tokenizer", tokenizer]
    done = subprocess.run([*command, "--output", output], capture_output=True, text=True, check=True)
    result = json.loads(output.read_text())
    assert str(path.parent) not in output.read_text()
    assert result["machine"].keys() == {
        "cpu", "cores", "memory_gb", "system", "python", "load_average_1min", "date"
    }  # fmt: skip
    assert result["versions"]["megatron-core"] and result["versions"]["gigatoken"]
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    assert result["input"]["text_bytes"] == text_bytes
    assert result["input"]["documents"] == len(TEXTS)
    (measured,) = result["tokenizers"]
    assert measured["outputs_equal"] is True
    assert measured["engine"] == "gigatoken"
    assert list(measured["methods"]) == ["plain", "fast", "fast-bulk", "ours"]
    for values in measured["methods"].values():
        assert values.keys() >= METHOD_NUMBERS
        assert all(values[key] > 0 for key in METHOD_NUMBERS)
        assert len(values["seconds_runs"]) == 1
        assert values["mb_per_second"] == pytest.approx(text_bytes / 1e6 / values["seconds"])
        assert values["tokens_per_second"] == pytest.approx(measured["tokens"] / values["seconds"])
        assert values["memory_kind"] in ("PSS", "RSS")
        assert 20 < values["peak_memory_mb"] < 10_000
    assert measured["methods"]["ours"]["ours_is_faster_by"] == 1
    assert measured["methods"]["fast"]["seconds_bare"] < measured["methods"]["fast"]["seconds"]
    assert "fast-bulk" in done.stdout and "all outputs equal" in done.stdout


def test_different_output_fails_loudly(
    benchmark: ModuleType,
    corpus: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from benchmarks.preprocess import Case

    right = Case.command
    wrong = (
        "import sys; [open(sys.argv[1] + end, 'wb').write(b'12') for end in ('.bin', '.idx')]; print('{}')"
    )

    def with_wrong_output(case: Case, method: str, prefix: Path) -> list[str]:
        return right(case, method, prefix) if method == "ours" else [sys.executable, "-c", wrong, str(prefix)]

    monkeypatch.setattr(Case, "command", with_wrong_output)
    output = tmp_path / "result.json"
    argv = ["preprocess", "--quick", "--input", str(corpus[0]), "--tokenizer", str(corpus[1])]
    assert benchmark.main([*argv, "--methods", "fast", "--output", str(output)]) == 78
    message = capsys.readouterr().err
    assert "outputs differ" in message and "preprocess_data_fast.py" in message
    assert not output.exists()


def test_different_documents_are_counted(benchmark: ModuleType, tmp_path: Path) -> None:
    from benchmarks.preprocess import different_documents

    for name, documents in (("a", [[1, 2], [3], [4]]), ("b", [[1, 2], [3, 3], [5]]), ("c", [[1, 2]])):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            for ids in documents:
                writer.add_document(np.array(ids, dtype=np.uint16))
    assert different_documents(tmp_path / "a", tmp_path / "a") == 0
    assert different_documents(tmp_path / "a", tmp_path / "b") == 2
    with pytest.raises(UserError, match="1 documents instead of 3"):
        different_documents(tmp_path / "a", tmp_path / "c")


def test_failing_method_is_named(
    benchmark: ModuleType,
    corpus: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from benchmarks.preprocess import Case

    monkeypatch.setattr(Case, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no room')"])
    argv = ["preprocess", "--quick", "--input", str(corpus[0]), "--tokenizer", str(corpus[1])]
    assert benchmark.main(argv) == 78
    message = capsys.readouterr().err
    assert "ours failed with exit code 1" in message and "no room" in message


def test_memory_of_a_generated_file(
    benchmark: ModuleType,
    corpus: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "memory.json"
    argv = ["preprocess-memory", "--gb", "0.0005", "--input", str(corpus[0]), "--tokenizer", str(corpus[1])]
    assert benchmark.main([*argv, "--limit-mb", "1", "--output", str(output)]) == 78
    result = json.loads(output.read_text())
    assert 5e5 <= result["input"]["text_bytes"] < 5.1e5
    assert 20 < result["peak_memory_mb"] < 10_000
    assert "exceeds --limit-mb 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["preprocess", "--input", "nowhere.jsonl.zst"], "nowhere.jsonl.zst: no such file"),
        (["preprocess", "--input", __file__], "give a .jsonl.zst file, or --size-mb"),
        (["preprocess", "--repeat", "0"], "--repeat is 0; give 1 or more"),
        (["preprocess", "--size-mb", "-1"], "--size-mb is -1.0; give more than 0"),
        (
            ["preprocess", "--size-mb", "0.01", "--tokenizer", __file__],
            "give a tokenizer.json or a SentencePiece",
        ),
        (["preprocess-memory", "--gb", "0"], "--gb is 0.0; give more than 0"),
        (["preprocess-memory", "--gb", "1e9"], "choose another --scratch or a smaller --gb"),
    ],
)
def test_refusals(
    benchmark: ModuleType, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(argv) == 78
    assert message in capsys.readouterr().err


def test_repeated_text_varies_and_is_reproducible(benchmark: ModuleType) -> None:
    from benchmarks.sample_text import repeated

    base = ["one two three four", "five six seven"]
    made = list(repeated(base, 400))
    assert made == list(repeated(base, 400))
    assert made[:2] == base
    assert sum(map(len, made)) >= 400 > sum(map(len, made[:-1]))
    assert not set(made[2:]) & set(base)


def test_memory_counts_child_processes(benchmark: ModuleType) -> None:
    from benchmarks.commands import run_command

    hold = "import time; held = bytearray(80_000_000); time.sleep(0.7)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    alone = run_command("alone", [sys.executable, "-c", "import time; time.sleep(0.3)"], sample_memory=True)
    both = run_command("both", [sys.executable, "-c", parent], sample_memory=True)
    assert alone.peak_memory_bytes is not None and both.peak_memory_bytes is not None
    assert both.peak_memory_bytes > alone.peak_memory_bytes + 80_000_000
