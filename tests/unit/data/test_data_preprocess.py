"""The preprocessing command: same output whatever the workers, and nothing half-written whatever happens."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import sentencepiece
import zstandard
from transformers import PreTrainedTokenizerFast

from megatron_lpa.data.preparation import preprocess as preprocess_module
from megatron_lpa.data.preparation.encode import encode_task
from megatron_lpa.data.preparation.preprocess import preprocess
from megatron_lpa.data.preparation.preprocess_config import PreprocessConfig
from megatron_lpa.data.storage.files import PartialFile, WrittenElsewhere
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.storage.manifest import read_manifest
from megatron_lpa.data.tokenizers.fast import WrongIdsError
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
        PreprocessConfig(f"{tmp_path}/out", str(bpe_folder), (str(corpus),), append_eod=True, log_interval=0)
    )
    prefix = f"{tmp_path}/out_text_document"
    texts = [text for line in corpus.read_text().splitlines() if (text := json.loads(line)["text"])]
    reference = PreTrainedTokenizerFast.from_pretrained(bpe_folder)
    expected = [[*ids, 0] for ids in reference(texts, add_special_tokens=False)["input_ids"]]
    dataset = IndexedDataset(prefix)
    assert [dataset.document(i).tolist() for i in range(dataset.num_documents)] == expected
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    assert manifests == {prefix: read_manifest(prefix)}
    assert manifest["documents"] == len(texts) and manifest["empty_documents"] == 2
    assert manifest["tokens"] == dataset.num_tokens
    assert manifest["bytes_text"] == sum(len(text.encode()) for text in texts)
    assert manifest["words"] == sum(len(text.split()) for text in texts)
    assert (manifest["dtype"], manifest["append_eod"]) == ("uint16", True)
    assert manifest["tokenizer"]["vocab_size"] == 600
    assert manifest["sources"] == [
        {
            "path": str(corpus),
            "size_bytes": corpus.stat().st_size,
            "sha256": hashlib.sha256(corpus.read_bytes()).hexdigest(),
            "documents": len(texts),
            **dict.fromkeys(("config", "split", "revision")),
        }
    ]
    for ending in ("bin", "idx"):
        digest = hashlib.sha256(Path(f"{prefix}.{ending}").read_bytes()).hexdigest()
        assert manifest["checksums"][ending] == [digest]


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
                f"{tmp_path}/{number}", str(bpe_folder), (str(path),), workers=workers, log_interval=0
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
    path.write_bytes(corpus.read_bytes() * 30)
    return path


@pytest.fixture(scope="module")
def undisturbed(long_corpus: Path, bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what an undisturbed run makes of the long corpus, its last lines bad."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with long_corpus.open("ab") as stream:
        stream.write(b'{"text": 1}\nnot JSON \xff\n{"text": "last"}\n')
    assert run_tool(*job(long_corpus, bpe_folder, folder)).returncode == 3
    return folder


def job(corpus: Path, tokenizer: Path, folder: Path) -> list[str]:
    arguments = ["--input", str(corpus), "--tokenizer", str(tokenizer), "--output-prefix", str(folder / "x")]
    arguments += ["--workers", "2", "--append-eod", "--on-bad-line", "skip", "--engine", "reference"]
    return [*arguments, "--commit-interval", "0.01", "--log-interval", "1"]


linux = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="looks at processes through Linux's /proc"
)


@linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_killed_at_random_moments_goes_on_to_the_same_bytes(
    long_corpus: Path, bpe_folder: Path, undisturbed: Path, tmp_path: Path, how: signal.Signals
) -> None:
    moments = random.Random(how)
    command = [sys.executable, str(TOOL), *job(long_corpus, bpe_folder, tmp_path)]
    documents_before, kills = 0, 6
    for _ in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.match(r"going on after (\d+) documents", first)
        if found:  # nothing that the ledger held is done again
            assert int(found[1]) >= documents_before
            documents_before = int(found[1])
        if moments.random() < 0.7:
            process.stderr.readline()  # more tokens are written
        workers = children(process.pid)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(how)
        assert "Traceback" not in first + process.stderr.read()
        assert process.wait(timeout=60) not in (0, 1, 3), "finished before it was killed"
        if not (tmp_path / "x_text_document.json").exists():
            with pytest.raises(UserError):  # nothing half-written looks whole
                IndexedDataset(tmp_path / "x_text_document")
        wait_for(lambda: not any(alive(pid) for pid in workers), "workers outlived the run")  # noqa: B023
    assert documents_before > 0
    assert run_tool(*command[2:]).returncode == 3
    compare_folders(tmp_path, undisturbed)
    rejected = [json.loads(line) for line in (tmp_path / "x.rejected.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in rejected] == [
        len(long_corpus.read_bytes().splitlines()) - 2,
        len(long_corpus.read_bytes().splitlines()) - 1,
    ]
    assert rejected[0]["record"] == '{"text": 1}' and "record_base64" in rejected[1]


def compare_folders(folder: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fault", ["killed", "signal", "error"])
def test_a_fault_between_any_two_system_calls_of_publication_is_recovered(
    corpus: Path, bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Every rename, removal and flush to disk in turn is the last of a killed run, or is where it is stopped."""

    def config(folder: Path) -> PreprocessConfig:
        return PreprocessConfig(
            f"{folder}/x",
            str(bpe_folder),
            (str(source),),
            json_keys=("text", "other"),
            engine="reference",
            log_interval=0,
            on_bad_line="skip",
            overwrite=True,
        )

    records = [{"text": f"document {i}", "other": f"{i} is a number"} for i in range(50)]
    source = write_jsonl(tmp_path / "in.jsonl", [*records, {"text": "no other"}])
    (tmp_path / "expected").mkdir()
    monkeypatch.setattr(preprocess_module, "ordered_map", in_this_process)
    preprocess(config(tmp_path / "expected"))
    real = {name: getattr(os, name) for name in ("replace", "unlink", "rename", "fsync")}
    for last_call in range(200):
        folder = tmp_path / str(last_call)
        folder.mkdir()
        calls = 0

        def counted(name: str) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += 1
                if calls == last_call + 1 or (fault == "killed" and calls > last_call):  # noqa: B023 - same turn
                    raise {
                        "killed": Killed(),
                        "signal": SystemExit(143),
                        "error": OSError(errno.EROFS, "no"),
                    }[fault]
                return real[name](*arguments, **options)

            return call

        for name in real:
            monkeypatch.setattr(os, name, counted(name))
        try:
            preprocess(config(folder))
            finished = True
        except (Killed, SystemExit, UserError, OSError):
            finished = False
        for name, function in real.items():
            monkeypatch.setattr(os, name, function)
        if not finished:
            preprocess(config(folder))
        compare_folders(folder, tmp_path / "expected")
        if finished:
            break
    assert finished and last_call > 15


def in_this_process(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    workers: int,
    initialize: Any,
    arguments: Any,
    _: Any,
) -> Iterator[Any]:
    initialize(*arguments)
    yield from map(function, items)


def test_unfinished_work_of_another_call_is_neither_mixed_in_nor_lost(
    long_corpus: Path, bpe_folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    arguments = job(long_corpus, bpe_folder, tmp_path)
    process = subprocess.Popen([sys.executable, str(TOOL), *arguments], stderr=subprocess.PIPE)
    assert process.stderr is not None
    for _ in range(3):
        process.stderr.readline()
    process.terminate()
    process.communicate()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "x.ledger.partial" in before
    for change, message in (
        (["--json-keys", "body"], "json keys was text, and now body"),
        (["--drop-subsets", "Github"], "dropped subsets was none, and now Github"),
        (["--input", str(bpe_folder / "../text.jsonl")], "the input "),
    ):
        refused = run_tool(*arguments, *change)
        assert refused.returncode == 1 and message in refused.stderr and "--restart" in refused.stderr
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert run_tool(*arguments, "--restart").returncode == 3
    compare_folders(tmp_path, undisturbed)


def test_shards_give_what_one_run_gives(prose: list[str], bpe_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(5):
        records = [{"text": text} for text in prose[number * 10 : number * 10 + 10]]
        write_jsonl(tmp_path / f"in/{number}.jsonl", records)
    config = PreprocessConfig(f"{tmp_path}/x", str(bpe_folder), (f"{tmp_path}/in",), log_interval=0)
    (whole,) = preprocess(config).values()
    parts = []
    for shard in range(3):
        parts += preprocess(dataclasses.replace(config, shard=(shard, 3))).values()
    for ending in ("bin",):
        names = [f"x.shard-{shard:05d}-of-00003_text_document.{ending}" for shard in range(3)]
        joined = b"".join((tmp_path / name).read_bytes() for name in names)
        assert joined == (tmp_path / f"x_text_document.{ending}").read_bytes()
    assert sum(part.documents for part in parts) == whole.documents == 50
    assert [source for part in parts for source in part.sources] == whole.sources


def test_subsets_are_counted_kept_and_dropped(bpe_folder: Path, tmp_path: Path) -> None:
    records = [{"text": "word " * i, "meta": {"pile_set_name": "AB"[i % 2]}} for i in range(1, 9)]
    write_jsonl(tmp_path / "in.jsonl", records)
    arguments = ["--input", tmp_path / "in.jsonl", "--tokenizer", bpe_folder, "--append-eod", "--workers", 1]
    assert run_tool(*arguments, "--output-prefix", tmp_path / "x").returncode == 0
    manifest = read_manifest(tmp_path / "x_text_document")
    assert manifest is not None
    dataset = IndexedDataset(tmp_path / "x_text_document")
    sizes = [len(dataset.document(i)) for i in range(8)]
    assert {name: (count.documents, count.tokens) for name, count in manifest.subsets.items()} == {
        "A": (4, sum(sizes[1::2])),
        "B": (4, sum(sizes[0::2])),
    }
    kept = run_tool(*arguments, "--output-prefix", tmp_path / "k", "--keep-subsets", "A", "C")
    assert kept.returncode == 3 and "4 dropped by subset" in kept.stdout
    assert "warning: no record was of subset 'C'" in kept.stderr
    dropped = run_tool(*arguments, "--output-prefix", tmp_path / "d", "--drop-subsets", "B")
    assert dropped.returncode == 0
    assert outputs(tmp_path, "k_*.bin") == outputs(tmp_path, "d_*.bin")


@linux
def test_a_dead_worker_ends_the_run_instead_of_hanging_it(
    long_corpus: Path, bpe_folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(TOOL), *job(long_corpus, bpe_folder, tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: a worker process died" in errors
    assert run_tool(*job(long_corpus, bpe_folder, tmp_path)).returncode == 3
    compare_folders(tmp_path, undisturbed)


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
    with pytest.raises(
        UserError,
        match=r"no document has tokens under 'text' \(3 are empty, 0 dropped because of their subset, 0 bad\)",
    ):
        preprocess(PreprocessConfig(f"{tmp_path}/x", str(bpe_folder), (str(path),)))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    write_jsonl(tmp_path / "a.jsonl", [{"text": i} for i in range(3)])
    config = PreprocessConfig(f"{tmp_path}/x", str(bpe_folder), (str(path),), on_bad_line="skip")
    with pytest.raises(UserError, match=r"0 are empty, 0 dropped because of their subset, 3 bad"):
        preprocess(config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "x.rejected.jsonl"]
    assert len((tmp_path / "x.rejected.jsonl").read_text().splitlines()) == 3


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
        "import sys, megatron_lpa.data.preparation.preprocess, megatron_lpa.data.batches, megatron_lpa.data.sampler, "
        "megatron_lpa.data.preparation.train_tokenizer; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_ids_found_wrong_are_not_kept_for_the_next_run(
    long_corpus: Path, bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def caught(task: Any) -> Any:
        nonlocal tasks
        tasks += 1
        if tasks == 3:
            raise WrongIdsError("other ids; start again with --engine reference")
        return encode_task(task)

    tasks = 0
    monkeypatch.setattr(preprocess_module, "ordered_map", in_this_process)
    monkeypatch.setattr(preprocess_module, "encode_task", caught)
    config = PreprocessConfig(
        f"{tmp_path}/x", str(bpe_folder), (str(long_corpus),), commit_interval_s=1e-9, on_bad_line="skip"
    )
    with pytest.raises(WrongIdsError):
        preprocess(config)
    assert tasks == 3 and list(tmp_path.iterdir()) == []


def test_a_dataset_that_changed_is_another_job(bpe_folder: Path, tmp_path: Path) -> None:
    def save(word: str) -> None:
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        rows = datasets.Dataset.from_dict({"text": [f"{word} {i}" for i in range(3000)]})
        rows.save_to_disk(str(tmp_path / "d"))

    save("old")
    config = PreprocessConfig(
        f"{tmp_path}/x", str(bpe_folder), dataset=str(tmp_path / "d"), engine="reference"
    )
    (manifest,) = preprocess(config).values()
    (source,) = manifest.sources
    assert (source.split, source.documents) == ("train", 3000) and source.revision is not None
    save("new")
    (after,) = preprocess(dataclasses.replace(config, overwrite=True)).values()
    assert after.sources[0].revision not in (None, source.revision)


def test_where_there_are_no_locks_one_file_still_has_one_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    first = PartialFile(tmp_path / "x")
    with pytest.raises(WrittenElsewhere, match=r"x\.partial\.lock exists"):
        PartialFile(tmp_path / "x")
    first.write(b"whole")
    first.finish()
    first.publish()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    PartialFile(tmp_path / "x").discard()
    assert (tmp_path / "x").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1
