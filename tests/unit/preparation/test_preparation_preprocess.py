"""The preprocessing command: same output whatever the workers, and bad options and inputs told plainly."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import sentencepiece
import zstandard
from support.preprocessing import ROOT, outputs, run_tool, write_jsonl
from transformers import PreTrainedTokenizerFast

from megatron_lpa.data.storage.dataset_manifest import read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.errors import UserError
from megatron_lpa.preparation.preprocess import preprocess
from megatron_lpa.preparation.preprocess_config import PreprocessConfig


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
    assert result.returncode == 78
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
    assert refused.returncode == 78
    assert "exists; choose another --output-prefix or pass --overwrite" in refused.stderr
    assert outputs(tmp_path, "x_*") == before
    assert run_tool("--input", tmp_path / "small.jsonl", *arguments, "--overwrite").returncode == 0
    assert IndexedDataset(tmp_path / "x_text_document").num_documents == 1
    assert json.loads((tmp_path / "x_text_document.json").read_text())["documents"] == 1


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
    misspelt = run_tool(*arguments, "--output-prefix", tmp_path / "m", "--subset-key", "meta.set")
    assert misspelt.returncode == 0
    assert "warning: no record names its subset under 'meta.set' (--subset-key)" in misspelt.stderr
    dropped = run_tool(*arguments, "--output-prefix", tmp_path / "d", "--drop-subsets", "B")
    assert dropped.returncode == 0
    assert outputs(tmp_path, "k_*.bin") == outputs(tmp_path, "d_*.bin")


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
        assert result.returncode == 78 and message in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_input_without_any_token_is_refused(bpe_folder: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": ""}] * 3)
    with pytest.raises(
        UserError,
        match=r"no document has tokens under 'text' \(3 are empty, 0 dropped because of their subset, 0 bad\)",  # noqa: E501
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
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 78


def test_workers_do_not_pay_for_torch() -> None:
    code = (
        "import sys, megatron_lpa.preparation.preprocess, megatron_lpa.data.batches, "
        "megatron_lpa.preparation.bpe; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_dataset_that_changed_is_another_job(bpe_folder: Path, tmp_path: Path) -> None:
    def save(word: str) -> None:
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        rows = datasets.Dataset.from_dict({"text": [f"{word} {i}" for i in range(3000)]})
        rows.save_to_disk(str(tmp_path / "d"))

    save("old")
    with pytest.raises(UserError, match=r"save_to_disk wrote; give it as --dataset"):
        preprocess(PreprocessConfig(f"{tmp_path}/x", str(bpe_folder), (str(tmp_path / "d"),)))
    config = PreprocessConfig(
        f"{tmp_path}/x", str(bpe_folder), dataset=str(tmp_path / "d"), engine="reference"
    )
    (manifest,) = preprocess(config).values()
    (source,) = manifest.sources
    assert (source.split, source.documents) == ("train", 3000) and source.revision is not None
    save("new")
    (after,) = preprocess(dataclasses.replace(config, overwrite=True)).values()
    assert after.sources[0].revision not in (None, source.revision)
