"""Damage of every kind is found, at the right place."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.token_datasets import EOD, VOCAB_SIZE, random_documents, write_dataset

from megatron_lpa.data.storage.dataset_manifest import Manifest, SubsetCount
from megatron_lpa.data.storage.indexed import HEADER, IndexedDataset
from megatron_lpa.errors import UserError
from megatron_lpa.inspection import index_check, token_check
from megatron_lpa.inspection.problems import Problem
from megatron_lpa.inspection.verification import verify

BLOCK = 256


def flip(path: Path, offset: int, mask: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        (value,) = stream.read(1)
        stream.seek(offset)
        stream.write(bytes([value ^ mask]))


def of_kind(problems: Sequence[Problem], kind: str) -> list[Problem]:
    return [problem for problem in problems if problem.kind == kind]


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small files take many steps, whose seams then are everywhere."""
    monkeypatch.setattr(token_check, "_READ_BYTES", 96)
    monkeypatch.setattr(token_check, "_DOCUMENTS", 3)
    monkeypatch.setattr(index_check, "_BLOCK", 5)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_good_dataset_has_no_problems(tmp_path: Path, small_steps: None, dtype: type) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(0, 60), dtype, block_bytes=BLOCK)
    found = verify(str(prefix))
    assert (found.problems, found.unlisted, found.unchecked) == ([], {}, [])


def test_without_manifest_it_says_what_was_not_checked(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(0, 60), manifest=False)
    found = verify(str(prefix))
    assert found.problems == []
    assert found.unchecked == [
        "checksums, ids against the vocabulary, ends of documents, and counts: d.json does not exist"
    ]


def test_megatrons_datasets_with_several_sequences_and_empty_documents_are_good(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core, the peer to compare with, is not installed")
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.int32)
    for document, lengths in (([], []), ([1, 2, 70000, 4, 5], [2, 0, 3]), ([], []), ([6], [1]), ([], [])):
        builder.add_document(document, lengths)
    builder.finalize(str(tmp_path / "d.idx"))
    assert verify(str(tmp_path / "d")).problems == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_every_damaged_byte_is_found_in_its_block(
    tmp_path: Path, small_steps: None, ending: str, seed: int
) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(seed, 60), block_bytes=BLOCK)
    path = Path(f"{prefix}.{ending}")
    random = np.random.default_rng(seed)
    for _ in range(60):
        offset, mask = int(random.integers(path.stat().st_size)), int(random.integers(1, 256))
        flip(path, offset, mask)
        found = of_kind(verify(str(prefix)).problems, "checksum")
        assert [(problem.path, problem.start // BLOCK) for problem in found] == [(str(path), offset // BLOCK)]
        assert found[0].start <= offset < found[0].stop <= path.stat().st_size
        flip(path, offset, mask)
    assert verify(str(prefix)).problems == []


def test_a_damaged_index_without_manifest_is_located_to_the_entry(tmp_path: Path, small_steps: None) -> None:
    documents = random_documents(0, 40)
    prefix = write_dataset(tmp_path / "d", documents, manifest=False)
    path, count = Path(f"{prefix}.idx"), len(documents)
    pointers, indices = HEADER.size + 4 * count, HEADER.size + 12 * count
    for offset in range(indices):  # all of the header, sizes and pointers
        flip(path, offset, 1 << (offset % 8))
        found = verify(str(prefix))
        assert found.problems, offset
        if offset < HEADER.size:
            if offset == 17:  # another integer type, by which no sequence fits its pointer
                assert {problem.kind for problem in found.problems} <= {"header", "sequences", "length"}
            else:
                assert any(p.start <= offset < p.stop for p in of_kind(found.problems, "header")), offset
        elif pointers - 4 <= offset < pointers:  # the last size: either it or the .bin is wrong
            (problem,) = found.problems
            assert (
                problem.path.endswith(".bin")
                and f"its last size is at byte {pointers - 4}" in problem.message
            )
        else:
            (problem,) = found.problems
            width = 4 if offset < pointers else 8
            start = HEADER.size if offset < pointers else pointers
            entry = (offset - start) // width
            assert (problem.path, problem.start) == (str(path), start + width * entry), offset
            assert problem.stop == problem.start + width
            assert f"sequence {entry} " in problem.message
        flip(path, offset, 1 << (offset % 8))


def test_document_indices_out_of_order_are_located(tmp_path: Path, small_steps: None) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(0, 40), manifest=False)
    path, first = Path(f"{prefix}.idx"), HEADER.size + 12 * 40
    for document in range(41):
        flip(path, first + 8 * document + 3, 1)
        found = verify(str(prefix)).problems
        assert found and all(p.start <= first + 8 * document < p.stop for p in found), document
        flip(path, first + 8 * document + 3, 1)


def test_the_manifest_tells_a_wrong_last_size_from_a_wrong_file(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(0, 40))
    path, last = Path(f"{prefix}.idx"), HEADER.size + 4 * 39
    flip(path, last, 1)
    (problem,) = of_kind(verify(str(prefix)).problems, "sequences")
    assert (problem.path, problem.start, problem.stop) == (str(path), last, last + 4)


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_files_cut_anywhere_or_too_long_are_found(tmp_path: Path, small_steps: None, ending: str) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(0, 12), block_bytes=BLOCK)
    path = Path(f"{prefix}.{ending}")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        found = verify(str(prefix)).problems
        kinds = {"bin": "length", "idx": "header"}[ending]
        assert of_kind(found, kinds) and of_kind(found, "checksum"), length
        assert any(p.path == str(path) and p.start <= length <= p.stop for p in of_kind(found, "checksum"))
        if ending == "bin":
            assert (found[0].start, found[0].stop) == (length, len(whole))
    path.write_bytes(whole + b"\0\0")
    assert of_kind(verify(str(prefix)).problems, {"bin": "length", "idx": "header"}[ending])


def test_swapped_files_are_found(tmp_path: Path) -> None:
    """Datasets of the same shape: only their contents tell them apart."""
    documents = random_documents(0, 40)
    one = write_dataset(tmp_path / "one", documents)
    write_dataset(
        tmp_path / "other", [[*(id % 7 + 1 for id in document[:-1]), EOD] for document in documents]
    )
    other = tmp_path / "other.bin"
    Path(f"{one}.bin").write_bytes(other.read_bytes())
    (problem,) = verify(str(one)).problems
    assert (problem.kind, problem.path) == ("checksum", f"{one}.bin")
    write_dataset(tmp_path / "third", random_documents(1, 41))
    Path(f"{one}.idx").write_bytes((tmp_path / "third.idx").read_bytes())
    assert of_kind(verify(str(one)).problems, "checksum")[0].path == f"{one}.idx"
    for ending in ("bin", "idx"):
        Path(f"{one}.{ending}").write_bytes((tmp_path / f"third.{ending}").read_bytes())
    found = verify(str(one)).problems
    assert {problem.kind for problem in found} >= {"counts", "checksum"}
    assert any("documents 40, but one.idx has 41" in problem.message for problem in found)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_ids_that_the_tokenizer_does_not_have_are_located(
    tmp_path: Path, small_steps: None, dtype: type
) -> None:
    documents = random_documents(3, 50)
    bad = {7: 2, 7 + 1: 0, 49: 0}
    for document, place in bad.items():
        documents[document][place] = VOCAB_SIZE + document
    prefix = write_dataset(tmp_path / "d", documents, dtype)
    found = verify(str(prefix)).problems
    starts = np.cumsum([0, *map(len, documents)])
    item = np.dtype(dtype).itemsize
    assert [(problem.kind, problem.start, problem.stop) for problem in found] == [
        ("token", item * (starts[d] + place), item * (starts[d] + place + 1)) for d, place in bad.items()
    ]
    for problem, (document, place) in zip(found, bad.items(), strict=True):
        assert problem.message == (
            f"token {starts[document] + place} of document {document} is {VOCAB_SIZE + document}; "
            f"the vocabulary has {VOCAB_SIZE} ids"
        )


def test_negative_ids_are_found_without_a_manifest(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2], [3, -4]], np.int32, manifest=False)
    (problem,) = verify(str(prefix)).problems
    assert (problem.start, problem.message) == (12, "token 3 of document 1 is -4")


def test_documents_without_their_end_are_located(tmp_path: Path, small_steps: None) -> None:
    documents = random_documents(4, 50)
    for document in (0, 20, 21, 49):
        documents[document][-1] = 9
    documents[30][0] = EOD  # inside a document it may stand
    prefix = write_dataset(tmp_path / "d", documents)
    found = verify(str(prefix)).problems
    ends = np.cumsum([len(document) for document in documents])
    assert [(problem.kind, problem.start, problem.stop) for problem in found] == [
        ("end", 2 * ends[d] - 2, 2 * ends[d]) for d in (0, 20, 21, 49)
    ]
    assert found[1].message == "document 20 ends with id 9, not with the end-of-document id 0"
    without = write_dataset(tmp_path / "e", documents, change=lambda m: replace(m, append_eod=False))
    assert verify(str(without)).problems == []


def test_empty_documents_have_no_end(tmp_path: Path, small_steps: None) -> None:
    prefix = write_dataset(tmp_path / "d", [[], [1, 0], [], [2, 0], []])
    found = verify(str(prefix)).problems
    assert [problem.message.partition(" is")[0] for problem in found] == [
        "document 0",
        "document 2",
        "document 4",
    ]


@pytest.mark.parametrize(
    ("name", "value"), [("documents", 41), ("tokens", 5), ("dtype", "int32")]
)  # fmt: skip
def test_a_manifest_of_other_counts_is_found(tmp_path: Path, name: str, value: object) -> None:
    prefix = write_dataset(
        tmp_path / "d",
        random_documents(0, 40),
        change=lambda m: replace(m, **{name: value}),  # type: ignore[arg-type]
    )
    problems = verify(str(prefix)).problems
    found = of_kind(problems, "counts")
    assert any(f"{name} {value}, but d.idx has" in problem.message for problem in found)
    assert {problem.path for problem in found} == {f"{prefix}.json"}
    if name == "dtype":  # nothing is made of tokens read in the wrong dtype
        assert {problem.kind for problem in problems} <= {"counts", "length"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: replace(m, subsets={"a": SubsetCount(41, 1)}),
            "documents by subset sum up to 41, more than all 40",
        ),
        (lambda m: replace(m, subsets={"a": SubsetCount(1, 10**6)}), "tokens by subset sum up to 1000000"),
        (lambda m: replace(m, sources=m.sources[:1]), "documents by source sum up to 20, not to all 40"),
    ],
)
def test_sums_of_a_manifest_that_do_not_fit_are_found(
    tmp_path: Path, change: Callable[[Manifest], Manifest], message: str
) -> None:
    prefix = write_dataset(tmp_path / "d", random_documents(0, 40), change=change)
    (found,) = verify(str(prefix)).problems
    assert found.kind == "counts" and message in found.message


def damaged_manifests() -> list[Callable[[dict[str, object]], object]]:
    return [
        lambda content: content.pop("tokens"),
        lambda content: content.update(format=1),
        lambda content: content.update(dtype="float33"),
        lambda content: content["checksums"].update(block_bytes=0),  # type: ignore[attr-defined]
        lambda content: content["checksums"].update(idx=None),  # type: ignore[attr-defined]
    ]


@pytest.mark.parametrize("change", damaged_manifests())
def test_a_damaged_manifest_is_a_problem_and_the_rest_is_checked(
    tmp_path: Path, change: Callable[[dict[str, object]], object]
) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, -5]], np.int32)
    path = Path(f"{prefix}.json")
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))
    found = verify(str(prefix))
    assert [problem.kind for problem in found.problems] == ["manifest", "token"]
    assert not found.problems[0].message.startswith(str(tmp_path))
    assert found.unchecked[0].endswith("d.json is damaged")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.idx: no such file"):
        verify(str(tmp_path / "none"))
    prefix = write_dataset(tmp_path / "d", [[1, 0]])
    for ending in ("bin", "idx"):
        path = Path(f"{prefix}.{ending}")
        data = path.read_bytes()
        path.unlink()
        found = verify(str(prefix))
        assert [(p.kind, p.path) for p in found.problems] == [("missing", str(path))]
        assert found.unchecked == [f"the rest, without d.{ending}"]
        path.write_bytes(data)


def test_millions_of_faults_are_counted_not_listed(tmp_path: Path) -> None:
    prefix = write_dataset(
        tmp_path / "d",
        [[5000] * 1000] * 100,
        change=lambda m: replace(m, checksums=replace(m.checksums, bin=["0" * 64] * 100, block_bytes=2000)),
    )
    found = verify(str(prefix))
    assert len(of_kind(found.problems, "token")) == len(of_kind(found.problems, "end")) == 20
    assert found.unlisted["token"] == 100_000 - 20
    assert found.unlisted["end"] == 100 - 20
    assert found.unlisted["checksum"] >= 100 - 20


def test_verify_accepts_no_index_that_the_reader_refuses(tmp_path: Path) -> None:
    """Any damage at all: whenever the reader raises, there is a problem."""
    prefix = write_dataset(tmp_path / "d", random_documents(0, 20), manifest=False)
    path = Path(f"{prefix}.idx")
    good, random = path.read_bytes(), np.random.default_rng(0)
    refusals = 0
    for _ in range(300):
        raw = bytearray(good)
        for _ in range(random.integers(1, 4)):
            raw[random.integers(len(raw))] = random.integers(256)
        path.write_bytes(raw)
        try:
            IndexedDataset(prefix)
        except UserError:
            refusals += 1
            assert verify(str(prefix)).problems
    assert refusals > 200
