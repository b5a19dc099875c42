"""What a run asks of its data: enough of it, of one tokenizer, and the model's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lpa.config import RunConfig
from megatron_lpa.config.model import ModelConfig
from megatron_lpa.config.run import DataConfig, TrainConfig
from megatron_lpa.data.splits import Splits
from megatron_lpa.data.storage.dataset_manifest import Checksums, Manifest, TokenizerRecord, write_manifest
from megatron_lpa.data.storage.indexed_writer import IndexedDatasetWriter
from megatron_lpa.errors import UserError
from megatron_lpa.train.data import check_tokenizer, open_data

S, BATCH = 10, 8


class FakeTokenizer:
    """What a check looks at."""

    def __init__(self, fingerprint: str, vocab_size: int = 90) -> None:
        self.name = "given"
        self.fingerprint = fingerprint
        self.vocab_size = vocab_size
        self.eod_id = 0


def write(
    prefix: Path,
    num_samples: int,
    fingerprint: str | None = "0" * 64,
    vocab_size: int = 90,
    append_eod: bool = True,
    eod_id: int = 0,
) -> str:
    """One document of as many samples, its ids by its name, with a manifest if it has a fingerprint."""
    with IndexedDatasetWriter(prefix, np.int32) as writer:
        writer.add_document((ord(prefix.name[0]) + np.arange(num_samples * S + 1)) % 90)
    if fingerprint is not None:
        tokenizer = TokenizerRecord(f"tok-{fingerprint}", fingerprint, vocab_size, eod_id)
        manifest = Manifest(
            documents=1, tokens=num_samples * S + 1, empty_documents=0, dropped_documents=0,
            rejected_documents=0,
            bytes_text=1, words=1, dtype="int32", json_key="text", append_eod=append_eod, tokenizer=tokenizer,
            checksums=Checksums([], []), sources=[],
        )  # fmt: skip
        write_manifest(prefix, manifest)
    return str(prefix)


def config(data: DataConfig, train: TrainConfig) -> RunConfig:
    model = ModelConfig(vocab_size=97, sequence_length=S)
    return RunConfig(model=model, data=data, train=replace(train, global_batch_size=BATCH))


def opened(data: DataConfig, train: TrainConfig | None = None) -> Splits:
    return open_data(config(data, train or TrainConfig(steps=1)))


def refusal(data: DataConfig, train: TrainConfig | None = None) -> str:
    with pytest.raises(UserError) as error:
        opened(data, train)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tokens_without_repetition_or_not_at_all(tmp_path: Path) -> None:
    data = DataConfig(train_prefix=write(tmp_path / "a", 80))
    assert opened(data, TrainConfig(tokens=800)).notes == ()  # ten steps of 8 samples of 10 tokens
    # One token more takes one step more, and so eight samples.
    text = refusal(data, TrainConfig(tokens=801))
    for part in ("train.tokens is 801", "a: 880 needed, 800 there, 80 short", "to 800", "data.allow_repeats"):
        assert part in text
    allowed = opened(replace(data, allow_repeats=True), TrainConfig(tokens=801))
    assert allowed.notes == (f"the run reads {tmp_path}/a 1.1 times",)


@pytest.mark.parametrize("num_samples", [8, 9, 15, 83])
def test_the_tokens_that_a_refusal_suggests_are_accepted(tmp_path: Path, num_samples: int) -> None:
    """83 samples are ten steps of 8 and not 830 tokens' eleven."""
    data = DataConfig(train_prefix=write(tmp_path / "a", num_samples))
    text = refusal(data, TrainConfig(tokens=num_samples * S + 100))
    suggested = int(text.split("Lower train.tokens to ")[1].split(", add")[0].replace(",", ""))
    assert suggested == num_samples // BATCH * BATCH * S
    opened(data, TrainConfig(tokens=suggested))
    assert f"Lower train.tokens to {suggested:,}" in refusal(data, TrainConfig(tokens=suggested + 1))


def test_data_of_less_than_one_step_needs_a_smaller_batch(tmp_path: Path) -> None:
    text = refusal(DataConfig(train_prefix=write(tmp_path / "a", 7)), TrainConfig(tokens=10))
    assert "only 7 samples to read, less than the 8 of one step" in text
    assert "lower train.global_batch_size" in text and "Lower train.tokens" not in text


def test_data_without_a_manifest_is_noted(tmp_path: Path) -> None:
    bare, other = write(tmp_path / "a", 20, None), write(tmp_path / "b", 20)
    for data in (
        DataConfig(train_prefix=bare, valid_prefix=other),
        DataConfig(train_prefix=other, valid_prefix=bare),
    ):
        (note,) = opened(data).notes
        assert note.startswith(f"{bare} has no manifest (a.json)") and "only the range of its ids" in note


def test_documents_of_one_run_end_alike(tmp_path: Path) -> None:
    first = write(tmp_path / "a", 20)
    for name, how, end in (
        ("b", {"append_eod": False}, "no end-of-document token"),
        ("c", {"eod_id": 5}, "end-of-document token 5"),
    ):
        other = write(tmp_path / name, 20, **how)
        text = refusal(DataConfig(train_prefix=first, valid_prefix=other))
        assert f"{other}.json: its documents end with {end}, but those of {first}.json with end-of-" in text
        assert "--append-eod" in text
    # Without them, which token it would be has no part in it.
    a, b = (write(tmp_path / n, 20, append_eod=False, eod_id=i) for i, n in enumerate(("d", "e")))
    opened(DataConfig(train_prefix=a, valid_prefix=b))


def test_steps_and_epochs_may_repeat_and_say_so(tmp_path: Path) -> None:
    data = DataConfig(train_prefix=write(tmp_path / "a", 80))
    assert opened(data, TrainConfig(steps=10)).notes == ()
    assert opened(data, TrainConfig(steps=25)).notes == (f"the run reads {tmp_path}/a 2.5 times",)
    assert opened(data, TrainConfig(epochs=2.0)).notes == (f"the run reads {tmp_path}/a 2 times",)


def test_a_blend_tells_the_shortfall_of_each_dataset(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", 60), write(tmp_path / "b", 10)
    data = DataConfig(blend={a: 3, b: 1}, split="1,0,0")
    splits = opened(data, TrainConfig(tokens=400))
    assert splits.notes == (
        "the run reads " + ", ".join(
            f"{prefix} ({percent} % of the samples) {times} times"
            for prefix, percent, times in (
                ((a, 75, 0.5), (b, 25, 1)) if splits.train.parts[0][0] == a else ((b, 25, 1), (a, 75, 0.5))
            )
        ),
    )  # fmt: skip
    text = refusal(data, TrainConfig(tokens=640))
    assert f"{b} (25 % of the samples): 160 needed, 100 there, 60 short" in text
    assert f"{a} (" not in text and "Lower train.tokens to 400" in text
    assert f"{a} (75 % of the samples): 1,200 needed, 600 there, 600 short" in refusal(
        data, TrainConfig(tokens=1600)
    )


def test_datasets_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / name, 20, mark * 64) for name, mark in (("a", "1"), ("b", "2"), ("c", "1")))
    unmarked = write(tmp_path / "d", 20, None)
    opened(DataConfig(blend={a: 1, c: 1, unmarked: 1}, split="1,0,0"))
    for data in (
        DataConfig(blend={a: 1, b: 1}, split="1,0,0"),
        DataConfig(train_prefix=a, valid_prefix=b),
        DataConfig(train_prefix=a, valid_prefix=c, test_prefix=b),
    ):
        text = refusal(data)
        for part in ("a.json", "b.json", "1" * 16, "2" * 16, "tok-1", "tok-2"):
            assert part in text


def test_data_of_a_larger_tokenizer_is_refused(tmp_path: Path) -> None:
    text = refusal(DataConfig(train_prefix=write(tmp_path / "a", 20, "1" * 64, 32000)))
    assert "a.json" in text and "32000" in text and "model.vocab_size is 97" in text


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", 20)
    Path(f"{prefix}.json").write_text("{}")
    assert "a.json" in refusal(DataConfig(train_prefix=prefix))


def test_the_given_tokenizer_has_to_be_the_datas(tmp_path: Path) -> None:
    data = DataConfig(train_prefix=write(tmp_path / "a", 20, "1" * 64), tokenizer="data/tokenizer")
    run = config(data, TrainConfig(steps=1))
    splits = open_data(run)
    check_tokenizer(FakeTokenizer("1" * 64), splits, run)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"data\.tokenizer=data/tokenizer has the fingerprint 2{16}, but .*a\.json"
    ):
        check_tokenizer(FakeTokenizer("2" * 64), splits, run)  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"data\.tokenizer=data/tokenizer has 98 ids, but model\.vocab_size is 97"
    ):
        check_tokenizer(FakeTokenizer("1" * 64, 98), splits, run)  # type: ignore[arg-type]
    without = replace(run, data=replace(data, train_prefix=write(tmp_path / "b", 20, None)))
    check_tokenizer(FakeTokenizer("2" * 64), open_data(without), without)  # type: ignore[arg-type]
