"""The preprocessing command: same output whatever the workers, and nothing half-written whatever happens."""

from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import zstandard
from transformers import PreTrainedTokenizerFast

from megatron_lpa.data.indexed import IndexedDataset
from megatron_lpa.data.preprocess import PreprocessConfig, preprocess
from megatron_lpa.errors import UserError

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "preprocess_data.py"


def write_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def run_tool(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


def outputs(folder: Path, pattern: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob(pattern))]


@pytest.fixture(scope="module")
def corpus(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [*prose, "", "naïve 日本 🙂"] * 2
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", [{"text": text} for text in texts])


def test_documents_are_the_texts_in_order_with_counts(corpus: Path, bpe_folder: Path, tmp_path: Path) -> None:
    manifests = preprocess(
        PreprocessConfig((str(corpus),), f"{tmp_path}/out", str(bpe_folder), append_eod=True, log_interval=0)
    )
    prefix = f"{tmp_path}/out_text_document"
    texts = [text for line in corpus.read_text().splitlines() if (text := json.loads(line)["text"])]
    reference = PreTrainedTokenizerFast.from_pretrained(bpe_folder)
    expected = [[*ids, 0] for ids in reference(texts, add_special_tokens=False)["input_ids"]]
    dataset = IndexedDataset(prefix)
    assert [dataset.document(i).tolist() for i in range(dataset.num_documents)] == expected
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    assert manifests == {prefix: manifest}
    assert manifest["documents"] == len(texts) and manifest["empty_documents"] == 2
    assert manifest["tokens"] == dataset.num_tokens
    assert manifest["bytes_text"] == sum(len(text.encode()) for text in texts)
    assert manifest["words"] == sum(len(text.split()) for text in texts)
    assert (manifest["dtype"], manifest["append_eod"]) == ("uint16", True)
    assert manifest["tokenizer"]["vocab_size"] == 600
    assert manifest["inputs"] == [{"path": str(corpus), "size_bytes": corpus.stat().st_size}]


def test_output_does_not_depend_on_workers_or_compression(
    corpus: Path, bpe_folder: Path, tmp_path: Path
) -> None:
    data = corpus.read_bytes()
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "z.jsonl.zst").write_bytes(zstandard.compress(data[:5000]) + zstandard.compress(data[5000:]))
    results = []
    for number, (path, workers) in enumerate(
        [(corpus, 1), (corpus, 2), (corpus, 3), (tmp_path / "z.jsonl.gz", 2), (tmp_path / "z.jsonl.zst", 2)]
    ):
        preprocess(
            PreprocessConfig(
                (str(path),), f"{tmp_path}/{number}", str(bpe_folder), workers=workers, log_interval=0
            )
        )
        results.append(outputs(tmp_path, f"{number}_text_document.[bi]*"))
    assert len(results[0]) == 2 and all(result == results[0] for result in results)


def test_megatron_options_two_keys_and_another_folder(
    sentencepiece_model: Path, tmp_path: Path, prose: list[str]
) -> None:
    records = [{"title": f"Topic {i}", "body": text, "id": i} for i, text in enumerate(prose[:5])]
    write_jsonl(tmp_path / "in.jsonl", [*records, {"title": "", "body": "end", "id": 5}])
    result = run_tool(
        *("--input", "in.jsonl", "--json-keys", "title", "body", "--output-prefix", "out/my", "--append-eod"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sentencepiece_model),
        *("--workers", 2, "--log-interval", 2),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "documents/s" in result.stderr and "MB/s" in result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"my_{key}_document.{ending}" for key in ("body", "title") for ending in ("bin", "idx", "json")
    ]
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    titles = IndexedDataset(tmp_path / "out/my_title_document")
    bodies = IndexedDataset(tmp_path / "out/my_body_document")
    assert (titles.num_documents, bodies.num_documents) == (5, 6)
    assert titles.document(3).tolist() == [*theirs.encode("Topic 3"), theirs.eos_id()]
    assert bodies.document(1).tolist() == [*theirs.encode(prose[1]), theirs.eos_id()]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_far_into_the_input_fails_cleanly(
    corpus: Path, bpe_folder: Path, tmp_path: Path, workers: int
) -> None:
    lines = corpus.read_text().splitlines()
    lines[100] = '{"text": 7}'
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    result = run_tool(
        *("--input", tmp_path / "bad.jsonl", "--tokenizer", bpe_folder, "--workers", workers),
        *("--output-prefix", tmp_path / "out" / "x"),
    )
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith(f"error: {tmp_path}/bad.jsonl:101: the value of 'text'")
    )
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_existing_output_is_kept_unless_told(corpus: Path, bpe_folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "small.jsonl", [{"text": "a few words"}])
    arguments = ("--tokenizer", bpe_folder, "--output-prefix", tmp_path / "x", "--workers", 1)
    assert run_tool("--input", corpus, *arguments).returncode == 0
    before = outputs(tmp_path, "x_*")
    refused = run_tool("--input", tmp_path / "small.jsonl", *arguments)
    assert refused.returncode == 1
    assert "exists; choose another --output-prefix or pass --overwrite" in refused.stderr
    assert outputs(tmp_path, "x_*") == before
    assert run_tool("--input", tmp_path / "small.jsonl", *arguments, "--overwrite").returncode == 0
    assert IndexedDataset(tmp_path / "x_text_document").num_documents == 1
    assert json.loads((tmp_path / "x_text_document.json").read_text())["documents"] == 1


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def long_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "long.jsonl"
    path.write_bytes(corpus.read_bytes() * 40)
    return path


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes through Linux's /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_nothing_that_looks_whole_and_no_process(
    long_corpus: Path, corpus: Path, bpe_folder: Path, tmp_path: Path, how: signal.Signals
) -> None:
    arguments = ["--tokenizer", str(bpe_folder), "--output-prefix", str(tmp_path / "x"), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, str(TOOL), "--input", str(long_corpus), *arguments, "--log-interval", "1"],
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    assert b"documents/s" in process.stderr.readline()  # tokens are being written
    workers = children(process.pid)
    assert len(workers) >= 2 and list(tmp_path.glob("*.partial"))
    process.send_signal(how)
    process.stderr.close()
    assert process.wait(timeout=30) != 0
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".partial")] == []
    if how == signal.SIGTERM:
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"no such file"):
        IndexedDataset(tmp_path / "x_text_document")
    wait_for(lambda: not any(alive(pid) for pid in workers), "workers outlived the run")
    # What the dead run left is no obstacle to the next.
    again = run_tool("--input", corpus, *arguments)
    assert again.returncode == 0, again.stderr
    assert not list(tmp_path.glob("*.partial"))
    IndexedDataset(tmp_path / "x_text_document")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at processes through Linux's /proc")
def test_a_dead_worker_ends_the_run_instead_of_hanging_it(
    long_corpus: Path, bpe_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(TOOL), "--input", str(long_corpus), "--tokenizer", str(bpe_folder)]
    command += ["--output-prefix", str(tmp_path / "x"), "--workers", "2", "--log-interval", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: a worker process died" in errors
    assert list(tmp_path.iterdir()) == []


def test_no_room_on_the_disk_is_said_plainly(corpus: Path, bpe_folder: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for a full disk: writing fails in the same place."""
    result = run_tool(
        *("--input", corpus, "--tokenizer", bpe_folder, "--workers", 1, "--output-prefix", tmp_path / "x"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 1
    assert "x_text_document.bin.partial: no room to write" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_options_that_cannot_work_are_refused_before_any_work(
    corpus: Path, bpe_folder: Path, sentencepiece_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    vocabulary = json.loads((bpe_folder / "tokenizer.json").read_text())
    vocabulary["added_tokens"] = []
    vocabulary["model"]["vocab"] = {
        token.replace("<|endoftext|>", "-"): i for token, i in vocabulary["model"]["vocab"].items() if i < 257
    }
    vocabulary["model"]["merges"] = []
    (tmp_path / "bare/tokenizer.json").write_text(json.dumps(vocabulary))
    for arguments, message in (
        (["--tokenizer", tmp_path / "bare", "--append-eod"], "has no end-of-document token"),
        (["--tokenizer", bpe_folder, "--workers", 0], "--workers is 0; give 1 or more"),
        (["--tokenizer", bpe_folder, "--json-keys", "text", "text"], "one or more different keys"),
        ([], "give the tokenizer once"),
        (["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", bpe_folder], "needs a SentencePiece"),
        (
            ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", sentencepiece_model],
            "needs a tokenizer.json",
        ),
    ):
        result = run_tool("--input", corpus, "--output-prefix", tmp_path / "out/x", *arguments)
        assert result.returncode == 1 and message in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_input_without_any_token_is_refused(bpe_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}] * 3)
    with pytest.raises(UserError, match=r"no document has tokens under 'text' \(3 are empty\)"):
        preprocess(PreprocessConfig((str(path),), f"{tmp_path}/x", str(bpe_folder)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_tokenizer_can_be_trained_and_used_from_the_command_line(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "train_tokenizer.py"), "--input", str(corpus)]
    command += ["--output", "tok", "--vocab-size", "300"]
    trained = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (trained.returncode, trained.stdout) == (0, "tok: 300 tokens\n"), trained.stderr
    result = run_tool("--input", corpus, "--tokenizer", "tok", "--output-prefix", "x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1


def test_workers_do_not_pay_for_torch() -> None:
    code = (
        "import sys, megatron_lpa.data.preprocess, megatron_lpa.data.batches, megatron_lpa.data.sampler, "
        "megatron_lpa.data.train_tokenizer; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
