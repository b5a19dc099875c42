"""Statistics of datasets against NumPy, and views of single documents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.token_datasets import EOD, random_documents, write_dataset

from megatron_lpa.data.storage.dataset_manifest import TokenizerRecord
from megatron_lpa.data.storage.indexed import IndexedDataset, best_dtype
from megatron_lpa.data.storage.indexed_writer import write_index
from megatron_lpa.data.tokenizers.opening import load_tokenizer
from megatron_lpa.errors import UserError
from megatron_lpa.inspection import statistics as inspection
from megatron_lpa.inspection.document_view import view_document
from megatron_lpa.inspection.rendering import length_figure, summary_json, summary_text
from megatron_lpa.inspection.statistics import LengthCounter, summarize

LENGTHS = {
    "one": [5],
    "equal": [7] * 10,
    "two": [1, 2],
    "with empty": [0, 0, 3, 8, 1, 0],
    "random": np.random.default_rng(0).integers(0, 5000, 1001).tolist(),
    "skewed": (np.random.default_rng(1).pareto(1.0, 3000) * 100).astype(int).tolist(),
    "beyond what is counted": [*range(1000), (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 1 << 25, 1 << 25,
    1 << 31],
    "all beyond": [1 << 21, 1 << 20, 1 << 22, 1 << 20],
}  # fmt: skip


@pytest.mark.parametrize("name", LENGTHS)
def test_length_statistics_are_numpys(name: str) -> None:
    lengths = np.array(LENGTHS[name])
    counter = LengthCounter()
    for start in range(0, len(lengths), 400):
        counter.add(lengths[start : start + 400])
    found = counter.statistics()
    assert (found.minimum, found.maximum) == (lengths.min(), lengths.max())
    assert found.mean == pytest.approx(lengths.mean(), rel=1e-12)
    assert found.median == np.median(lengths)
    assert found.p99 == pytest.approx(np.percentile(lengths, 99), rel=1e-12)
    assert sum(bucket.documents for bucket in found.buckets) == len(lengths)
    for before, after in zip(found.buckets, found.buckets[1:], strict=False):
        assert after.low == before.high + 1
    assert found.buckets[0].documents and found.buckets[-1].documents
    for bucket in found.buckets:
        inside = lengths[(bucket.low <= lengths) & (lengths <= bucket.high)]
        assert (bucket.documents, bucket.tokens) == (len(inside), inside.sum())
        assert bucket.low == 0 or (bucket.low & (bucket.low - 1) == 0 and bucket.high == 2 * bucket.low - 1)


def test_summary_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_BLOCK", 7)
    documents = random_documents(0, 101)
    lengths = np.array([len(document) for document in documents])
    summary = summarize(str(write_dataset(tmp_path / "d", documents)))
    assert (summary.documents, summary.sequences, summary.tokens) == (101, 101, lengths.sum())
    assert (summary.dtype, summary.bin_bytes) == ("uint16", 2 * lengths.sum())
    assert summary.idx_bytes == (tmp_path / "d.idx").stat().st_size
    assert summary.lengths.median == np.median(lengths)
    halves = [lengths[:50].sum(), lengths[50:].sum()]
    assert [part.tokens for part in summary.sources] == halves
    assert [part.name for part in summary.sources] == ["d.a.jsonl", "d.b.jsonl"]
    assert {part.name: part.tokens for part in summary.subsets} == {"Pile-CC": halves[0], "d": halves[1]}
    assert [part.tokens for part in summary.subsets] == sorted(halves, reverse=True)
    text = summary_text(summary)
    for expected in ("101", f"{lengths.sum():,} (uint16)", "f" * 64, "1,000 ids", "Pile-CC", "d.b.jsonl",
                     f"{halves[0] / lengths.sum():.2%}", "4.000", "1 empty, 2 dropped, 3 rejected"):  # fmt: skip  # noqa: E501
        assert expected in text, expected
    assert sum(line.count("#") for line in text.splitlines()) > 40
    content = json.loads(json.dumps(summary_json(summary)))
    assert content["tokens"] == lengths.sum() and content["lengths"]["p99"] == summary.lengths.p99
    assert "checksums" not in content["manifest"]
    assert content["manifest"]["tokenizer"]["fingerprint"] == "f" * 64


def test_sources_that_do_not_add_up_have_no_tokens(tmp_path: Path) -> None:
    prefix = write_dataset(
        tmp_path / "d",
        random_documents(0, 10),
        change=lambda m: replace(m, sources=[replace(m.sources[0], documents=9)]),
    )
    summary = summarize(str(prefix))
    assert [part.tokens for part in summary.sources] == [None]
    assert " - " in summary_text(summary)


def test_megatrons_datasets_without_manifest(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core, the peer to compare with, is not installed")
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.int32)
    builder.add_document([1, 2, 3, 4, 5], [2, 3])
    builder.add_document([], [])
    builder.add_document([6], [1])
    builder.finalize(str(tmp_path / "d.idx"))
    summary = summarize(str(tmp_path / "d"))
    assert (summary.documents, summary.sequences, summary.tokens) == (3, 3, 6)
    assert (summary.lengths.minimum, summary.lengths.median, summary.lengths.maximum) == (0, 1, 5)
    assert summary.manifest is None and "none" in summary_text(summary)
    assert view_document(str(tmp_path / "d"), 0).ids == [1, 2, 3, 4, 5]
    assert view_document(str(tmp_path / "d"), -2).ids == []


def test_a_huge_dataset_needs_little_more_than_its_index(tmp_path: Path) -> None:
    """51 G tokens: the .bin is a hole, of which nothing may be read."""
    sizes = np.full(100, 510_000_000, dtype=np.int32)
    file, _ = write_index(tmp_path / "d", best_dtype(50257), lambda: [sizes], 100, [np.arange(101)], 100)
    file.publish()
    with (tmp_path / "d.bin").open("wb") as stream:
        stream.truncate(2 * 51_000_000_000)
    summary = summarize(str(tmp_path / "d"))
    assert summary.tokens == 51_000_000_000
    assert summary.lengths.mean == summary.lengths.median == 510_000_000
    assert IndexedDataset(tmp_path / "d").document_offset(99) == 99 * 510_000_000


def test_the_figure_has_both_shares(tmp_path: Path) -> None:
    summary = summarize(str(write_dataset(tmp_path / "d", random_documents(0, 50))))
    (axes,) = length_figure(summary).axes
    heights = [bar.get_height() for bar in axes.patches]
    assert len(heights) == 2 * len(summary.lengths.buckets)
    assert sum(heights) == pytest.approx(200)


# Single documents


@pytest.fixture
def tokenized(tmp_path: Path, bpe_folder: Path, prose: list[str]) -> Path:
    """The first pieces of prose, as the tokenizer of ``bpe_folder`` has them."""
    tokenizer = load_tokenizer(str(bpe_folder))
    documents = [[*tokenizer.encode(text), EOD] for text in prose[:5]]
    record = TokenizerRecord(str(bpe_folder), tokenizer.fingerprint, tokenizer.vocab_size, EOD)
    return write_dataset(tmp_path / "d", documents, change=lambda m: replace(m, tokenizer=record))


def test_documents_by_number_and_from_the_end(tokenized: Path, prose: list[str]) -> None:
    dataset = IndexedDataset(tokenized)
    for number in range(-5, 5):
        view = view_document(str(tokenized), number)
        assert view.number == number % 5
        assert view.ids == dataset.document(number % 5).tolist()
        assert view.first_token == dataset.document_offset(number % 5)
        assert view.text == prose[number % 5] + "<|endoftext|>"
        assert view.note == ""


@pytest.mark.parametrize("number", [5, -6, 10**30, -(10**30), 2**63])
def test_numbers_of_no_document_are_refused(tokenized: Path, number: int) -> None:
    with pytest.raises(UserError, match=rf"has no document {number}; give 0 to 4, or -1 to -5 from the end"):
        view_document(str(tokenized), number)


def test_the_tokenizer_has_to_be_the_one_recorded(
    tokenized: Path, bpe_folder: Path, sentencepiece_model: Path, prose: list[str]
) -> None:
    assert view_document(str(tokenized), 0, str(bpe_folder)).text == prose[0] + "<|endoftext|>"
    with pytest.raises(UserError, match=r"tokenizer\.model: has the fingerprint .*d\.json was made with"):
        view_document(str(tokenized), 0, str(sentencepiece_model))
    Path(f"{tokenized}.json").unlink()
    view = view_document(str(tokenized), 0)
    assert view.text is None and "no manifest" in view.note
    view = view_document(str(tokenized), 0, str(bpe_folder))
    assert view.text == prose[0] + "<|endoftext|>" and "not known whether" in view.note


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"name": "some/hub-name"}, "some/hub-name is not here"),
        ({"fingerprint": "e" * 64}, "another one by now"),
        ({"name": "/etc"}, "cannot be read"),
    ],
)
def test_without_the_recorded_tokenizer_there_are_ids_and_a_note(
    tmp_path: Path, bpe_folder: Path, change: dict[str, str], note: str
) -> None:
    record = replace(TokenizerRecord(str(bpe_folder), "f" * 64, 600, EOD), **change)  # type: ignore[arg-type]
    prefix = write_dataset(tmp_path / "d", [[5, 0]], change=lambda m: replace(m, tokenizer=record))
    view = view_document(str(prefix), 0)
    assert view.ids == [5, 0] and view.text is None and note in view.note


def test_ids_beyond_the_tokenizer_are_refused(tmp_path: Path, sentencepiece_model: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1], [5, 60000]], manifest=False)
    with pytest.raises(UserError, match=r"d\.bin: token 2 is 60000, which .* does not know"):
        view_document(str(prefix), 1, str(sentencepiece_model))
