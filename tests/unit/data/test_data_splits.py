"""From ``data.*`` keys to splits: nothing leaks, nothing is lost, and what cannot be is refused."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from support.token_datasets import write_dataset

from megatron_lpa.config.run import DataConfig
from megatron_lpa.data import packing, source
from megatron_lpa.data.blend import Blend
from megatron_lpa.data.gpt_dataset import GPTDataset
from megatron_lpa.data.samples import Samples
from megatron_lpa.data.splits import Splits, exact_weights, open_splits, split_documents
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter
from megatron_lpa.errors import UserError

LENGTHS = np.random.default_rng(0).integers(1, 30, size=400)


def write(prefix: Path, lengths: np.ndarray | list[int], first_id: int = 0) -> str:
    """Documents of these lengths; ids of document ``d`` are all ``first_id + d``."""
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        for document, length in enumerate(lengths):
            writer.add_document(np.full(length, first_id + document))
    return str(prefix)


def ids_of(samples: Samples | None) -> set[int]:
    assert samples is not None
    return set(samples.read(samples.in_order(np.arange(samples.num_samples))).ravel().tolist())


def opened(data: DataConfig, sequence_length: int = 8, seed: int = 1) -> Splits:
    said: list[str] = []
    splits = open_splits(data, sequence_length, seed, said.append)
    assert said == []
    return splits


def sequence(samples: Samples, count: int = 30) -> list[list[int]]:
    return samples.read(samples.shuffled(np.arange(count))).tolist()


@pytest.mark.parametrize("shuffle", [True, False])
def test_no_document_is_in_two_splits_and_none_is_lost(tmp_path: Path, shuffle: bool) -> None:
    prefix = write(tmp_path / "d", LENGTHS)
    splits = opened(DataConfig(prefix=prefix, split="80,15,5", shuffle_documents=shuffle), sequence_length=1)
    train, valid, test = (ids_of(split) for split in (splits.train, splits.valid, splits.test))
    assert not train & valid and not train & test and not valid & test
    # With S = 1 all ids but one of a split are labels and all are read.
    assert train | valid | test == set(range(400))
    assert (len(train), len(valid), len(test)) == (320, 60, 20)
    if shuffle:  # from all over the file
        assert min(valid) < 40 and max(valid) > 360 and len(valid & set(range(320))) > 30
    else:
        assert valid == set(range(320, 380))


def test_train_seed_changes_samples_order_only_and_document_seed_the_split(tmp_path: Path) -> None:
    data = DataConfig(prefix=write(tmp_path / "d", LENGTHS), split="80,15,5")
    first, second = opened(data, seed=1), opened(data, seed=2)
    assert ids_of(first.valid) == ids_of(second.valid)
    assert sequence(first.train) != sequence(second.train)
    other = opened(replace(data, document_seed=2))
    assert ids_of(first.valid) != ids_of(other.valid)


def test_the_order_does_not_depend_on_where_the_data_and_the_cache_lie(tmp_path: Path) -> None:
    data = DataConfig(prefix=write(tmp_path / "d", LENGTHS))
    first = opened(data)
    (tmp_path / "moved").mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{data.prefix}{suffix}", tmp_path / "moved" / f"e{suffix}")
    moved = opened(DataConfig(prefix=str(tmp_path / "moved" / "e"), cache_dir=str(tmp_path / "cache")))
    assert sequence(moved.train) == sequence(first.train)
    assert moved.train.facts() == first.train.facts()
    assert list((tmp_path / "cache").glob("e-train-*.index"))
    assert not (tmp_path / "moved" / "e.cache").exists()


def test_golden_samples(tmp_path: Path) -> None:
    """If this fails, running experiments would silently see other data: do not change the numbers."""
    train = opened(DataConfig(prefix=write(tmp_path / "d", LENGTHS)), seed=27).train
    assert sequence(train, 3) == [
        [180, 180, 180, 180, 180, 180, 180, 187, 187],
        [151, 151, 151, 151, 151, 151, 151, 151, 151],
        [26, 26, 26, 26, 26, 26, 26, 26, 26],
    ]


def test_later_starts_read_the_cache_and_changed_data_makes_it_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = source.sample_starts
    monkeypatch.setattr(source, "sample_starts", lambda *args: made.append(args[2]) or real(*args))
    data = DataConfig(prefix=write(tmp_path / "d", LENGTHS), split="8,1,1")
    first = sequence(opened(data).train)
    assert len(made) == 3
    assert sequence(opened(data).train) == first and len(made) == 3
    opened(data, seed=9)
    assert len(made) == 3  # the seed of the samples has no part in it
    opened(data, sequence_length=4)
    assert len(made) == 6
    os.utime(f"{data.prefix}.idx", ns=(1, 1))
    assert sequence(opened(data).train) == first and len(made) == 9
    write(tmp_path / "d", LENGTHS[::-1])
    assert sequence(opened(data).train) != first and len(made) == 12


def test_damage_inside_the_index_is_found_before_anything_is_kept(tmp_path: Path) -> None:
    prefix = write(tmp_path / "d", LENGTHS)
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[34 + 4 * 400 + 8 * 200] ^= 1  # the pointer of sequence 200
    path.write_bytes(content)
    for shuffle in (True, False):
        with pytest.raises(UserError, match=r"d\.idx: sequence 200 has"):
            opened(DataConfig(prefix=prefix, shuffle_documents=shuffle))
    assert not list(tmp_path.rglob("*.index"))


def test_a_large_dataset_in_the_order_of_the_file_is_checked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_QUICK_DOCUMENTS", 100)
    checks = []
    real = source.IndexedDataset
    monkeypatch.setattr(
        source, "IndexedDataset", lambda prefix, check=True: checks.append(check) or real(prefix, check)
    )
    data = DataConfig(prefix=write(tmp_path / "d", LENGTHS), shuffle_documents=False)
    first = sequence(opened(data).train)
    assert checks == [False, True]
    assert sequence(opened(data).train) == first and checks == [False, True, False]


def test_progress_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(source, "_SLOW_DOCUMENTS", 100)
    open_splits(DataConfig(prefix=write(tmp_path / "d", LENGTHS)), 8, 1)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("indexing 400 documents") == 1


def test_train_prefix_is_shuffled_and_its_companions_are_not(tmp_path: Path) -> None:
    train, valid = write(tmp_path / "t", LENGTHS, 1), write(tmp_path / "v", LENGTHS)
    splits = opened(DataConfig(train_prefix=train, valid_prefix=valid, test_prefix=valid))
    stream = np.repeat(np.arange(400), LENGTHS)
    for split in (splits.valid, splits.test):
        assert split is not None and split.read(np.array([0, 5])).tolist() == [
            stream[:9].tolist(),
            stream[40:49].tolist(),
        ]
    assert splits.train.read(np.array([0])).tolist() != [stream[:9].tolist()]
    assert splits.prefixes == (train, valid)


def test_exact_weights() -> None:
    assert exact_weights({"a": 0.3, "b": 0.7}) == {"a": Fraction(3, 10), "b": Fraction(7, 10)}
    assert exact_weights({"a": 1e-7, "b": 3}) == {
        "a": Fraction(1, 30_000_001),
        "b": Fraction(30_000_000, 30_000_001),
    }


@pytest.fixture
def three(tmp_path: Path) -> dict[str, float]:
    names = ("b", "a", "c")
    return {
        write(tmp_path / name, LENGTHS[100 * i : 400], 1000 * i): weight
        for i, (name, weight) in enumerate(zip(names, (0.5, 0.2, 0.3), strict=True))
    }


def test_a_blend_cuts_every_dataset_by_its_own_documents(three: dict[str, float]) -> None:
    splits = opened(DataConfig(blend=three, split="70,20,10"))
    train, valid, test = (ids_of(split) for split in (splits.train, splits.valid, splits.test))
    assert not train & valid and not train & test and not valid & test
    for split in (splits.train, splits.valid, splits.test):
        assert isinstance(split, Blend)
        shares = {prefix: weight for prefix, weight, _ in split.parts}
        assert shares == exact_weights(three)
    assert {ident // 1000 for ident in valid} == {0, 1, 2}
    assert [("valid split reads" in note, "test split reads" in note) for note in splits.notes] == [
        (True, False),
        (False, True),
    ]
    assert set(splits.prefixes) == set(three)
    # Every dataset's own part is the one that it has alone.
    for prefix in three:
        alone = opened(DataConfig(prefix=prefix, split="70,20,10"))
        assert isinstance(splits.valid, Blend) and isinstance(alone.valid, GPTDataset)
        (part,) = (part for part in splits.valid.datasets if part.indexed.prefix == prefix)
        assert ids_of(part) == ids_of(alone.valid)


def test_a_blend_depends_on_contents_not_on_names_or_their_order(
    three: dict[str, float], tmp_path: Path
) -> None:
    first = opened(DataConfig(blend=three))
    backwards = opened(DataConfig(blend=dict(reversed(three.items()))))
    renamed = {}
    for number, (prefix, weight) in enumerate(three.items()):
        for suffix in (".bin", ".idx"):
            shutil.copy(f"{prefix}{suffix}", tmp_path / f"renamed{number}{suffix}")
        renamed[str(tmp_path / f"renamed{number}")] = weight
    for other in (backwards, opened(DataConfig(blend=renamed))):
        assert sequence(other.train) == sequence(first.train)
        assert other.train.facts() == first.train.facts()
    doubled = opened(DataConfig(blend={prefix: 2 * weight for prefix, weight in three.items()}))
    assert doubled.train.facts() == first.train.facts()


def test_facts_tell_what_changed(three: dict[str, float], tmp_path: Path) -> None:
    def facts(data: DataConfig, sequence_length: int = 8) -> dict[str, object]:
        return opened(data, sequence_length).train.facts()

    prefix = next(iter(three))
    base = facts(DataConfig(prefix=prefix))
    for other, changed in (
        (facts(DataConfig(prefix=prefix), 4), {"sequence_length"}),
        (facts(DataConfig(prefix=prefix, document_seed=2)), {"document_seed"}),
        (facts(DataConfig(prefix=prefix, shuffle_documents=False)), {"document_seed"}),
        (facts(DataConfig(prefix=prefix, split="9,1,0")), {"documents"}),
        (facts(DataConfig(prefix=write(tmp_path / "x", LENGTHS, 1))), {"contents"}),
        (facts(DataConfig(prefix=write(tmp_path / "y", [*LENGTHS, 3]))), {"contents", "documents", "tokens"}),
    ):
        assert {key for key in base if base[key] != other[key]} == changed
    heavier = facts(DataConfig(blend={**three, prefix: 0.6}))
    assert heavier != facts(DataConfig(blend=three))


def test_a_change_between_the_ends_is_another_dataset(tmp_path: Path) -> None:
    """By the pieces that are read, or, of a single token, by the manifest's checksums."""
    documents = [np.full(1 << 20, 3), np.full(1 << 20, 4)]  # 8 MiB of ids
    facts = []
    for name, changed in (("a", slice(0)), ("b", slice(1 << 19, 1 << 20)), ("c", slice(700_001, 700_002))):
        documents[0][changed] = 5
        write_dataset(tmp_path / name, documents, np.int32, block_bytes=1 << 20)  # type: ignore[arg-type]
        documents[0][changed] = 3
        facts.append(opened(DataConfig(train_prefix=str(tmp_path / name))).train.facts())
    assert facts[0]["contents"] == facts[2]["contents"] != facts[1]["contents"]
    assert len({fact["checksums"] for fact in facts}) == 3
    opened(DataConfig(blend={str(tmp_path / name): 1 for name in "abc"}, split="1,0,0"))
    (tmp_path / "c.json").unlink()
    assert opened(DataConfig(train_prefix=str(tmp_path / "c"))).train.facts() == {
        **facts[0],
        "checksums": None,
    }


def test_training_data_is_not_held_out_too(tmp_path: Path) -> None:
    train, other = write(tmp_path / "t", LENGTHS), write(tmp_path / "o", LENGTHS, 1)
    (tmp_path / "folder").mkdir()
    copy = write(tmp_path / "folder" / "copy", LENGTHS)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(f"{train}{suffix}")
    for spelling in (train, f"{tmp_path}/folder/../t", str(tmp_path / "link"), copy):
        for name in ("valid", "test"):
            with pytest.raises(UserError) as error:
                opened(DataConfig(train_prefix=train, **{f"{name}_prefix": spelling}))
            assert f"data.{name}_prefix {spelling} is the training data" in str(error.value)
            assert f"data.train_prefix {train}:" in str(error.value)
        with pytest.raises(UserError) as error:
            opened(DataConfig(blend={train: 0.5, other: 1, spelling: 0.5} if spelling != train else {
                f"{tmp_path}/./t": 0.5, train: 0.5}))  # fmt: skip
        assert "data.blend has one dataset twice" in str(error.value)
        assert train in str(error.value) and (spelling == train or spelling in str(error.value))
    opened(DataConfig(train_prefix=train, valid_prefix=other, test_prefix=other))


def test_too_many_documents_to_shuffle_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MAX_DOCUMENTS", 399)
    prefix = write(tmp_path / "d", LENGTHS)
    for data in (DataConfig(prefix=prefix), DataConfig(train_prefix=prefix), DataConfig(blend={prefix: 1})):
        with pytest.raises(
            UserError, match=r"d: 400 documents, but at most 399 can be .*shuffle_documents to"
        ):
            opened(data)
        opened(replace(data, shuffle_documents=False))


def test_parts_of_a_blend_without_held_out_samples_are_left_out_with_a_note(tmp_path: Path) -> None:
    long, short = write(tmp_path / "long", LENGTHS), write(tmp_path / "short", [40, 40, 40, 2])
    splits = opened(DataConfig(blend={long: 3, short: 1}, split="80,20,0"))
    assert splits.test is None and splits.valid is not None
    assert splits.valid.parts[0][:2] in ((long, 1), (short, 1)) or len(splits.valid.parts) == 2
    splits = opened(DataConfig(blend={long: 3, short: 1}, split="98,2,0"))
    assert splits.valid is not None and [part[:2] for part in splits.valid.parts] == [(long, Fraction(1))]
    assert any(f"not in the valid split: {short}" in note for note in splits.notes)
    both = opened(DataConfig(blend={short: 1}, split="100,0,0"))
    assert both.valid is None and both.notes == ()
    none = opened(DataConfig(blend={short: 1}, split="98,1,1"))
    assert none.valid is None and [note.split(":")[0] for note in none.notes] == [
        "no valid split",
        "no test split",
    ]


def test_what_a_blend_cannot_do_is_refused(tmp_path: Path, three: dict[str, float]) -> None:
    short = write(tmp_path / "short", [3])
    with pytest.raises(UserError, match=r"short: the train documents 0 to 1 hold 3 tokens"):
        opened(DataConfig(blend={**three, short: 1}, split="1,0,0"))
    with pytest.raises(UserError, match=r"nowhere\.idx: no such file"):
        opened(DataConfig(blend={**three, str(tmp_path / "nowhere"): 1}))
    for other in ({"prefix": short}, {"train_prefix": short}, {"valid_prefix": short}):
        with pytest.raises(UserError, match="give one kind only"):
            opened(DataConfig(blend=three, **other))
    with pytest.raises(UserError, match=r"leaves none of the 1 documents of .*short for training"):
        opened(DataConfig(blend={short: 1}, split="0,1,0"))


def test_split_documents_of_a_shuffled_order_cover_it() -> None:
    for num_documents in (1, 2, 33, 1000):
        train, valid, test = split_documents(num_documents, "969,30,1")
        assert [*range(*train), *range(*valid), *range(*test)] == list(range(num_documents))
