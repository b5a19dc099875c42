"""What is measured of a long stream of tokens is read where it is needed, and no further."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.token_datasets import random_documents, write_dataset

from megatron_lpa.commands import evaluate
from megatron_lpa.config import DataConfig
from megatron_lpa.data.splits import open_splits
from megatron_lpa.data.storage.indexed import HEADER, MAGIC, VERSION, IndexedDataset
from megatron_lpa.data.tokenizers.opening import Tokenizer
from megatron_lpa.evaluate import perplexity
from megatron_lpa.evaluate.held_out import DatasetTokens, SplitTokens
from megatron_lpa.evaluate.perplexity import Part, count_text, measure
from megatron_lpa.model.transformer import Decoder

SaveRun = Callable[..., Path]

MEASURE = """
import resource, sys
from megatron_lpa.commands import evaluate
used = []
for prefix in sys.argv[2:]:
    assert evaluate.main(["--run", sys.argv[1], "--data", prefix, "--max-tokens", "100", "--json"]) == 0
    used.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(used[1] - used[0], file=sys.stderr)
"""


def write_sparse(prefix: Path, documents: int, tokens_each: int) -> str:
    """A dataset of uint16 zeros that takes no room on the disk."""
    sizes = np.full(documents, tokens_each, "<i4")
    pointers = np.arange(documents, dtype="<i8") * tokens_each * 2
    header = HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1)
    indices = np.arange(documents + 1, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + indices.tobytes())
    with Path(f"{prefix}.bin").open("wb") as file:
        file.truncate(documents * tokens_each * 2)
    return str(prefix)


def test_the_first_tokens_of_a_long_dataset_take_no_more_memory_than_those_of_a_short_one(
    tmp_path: Path, save_run: SaveRun
) -> None:
    run = save_run(tmp_path / "runs" / "a")
    short = write_sparse(tmp_path / "short", 2, 500)
    long = write_sparse(tmp_path / "long", 1000, 250_000)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(run), short, long],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    grown = int(done.stderr.split()[-1])
    assert grown < 50e6, f"{grown:,} bytes more for a file of 500 MB"
    one, other = (json.loads("{" + text) for text in done.stdout.split("{")[1:])
    assert one == other and one["tokens"] == 96


@pytest.mark.parametrize("shuffle", [True, False])
def test_any_part_of_a_split_is_that_of_all_its_samples_joined(tmp_path: Path, shuffle: bool) -> None:
    prefix = str(write_dataset(tmp_path / "data", random_documents(1, 60)))
    split = open_splits(DataConfig(prefix=prefix, split="50,50,0", shuffle_documents=shuffle), 7, 1).valid
    assert split is not None
    ((dataset, count),) = split.giving(split.num_samples - 1)
    stream = SplitTokens(dataset, count)
    joined = np.append(dataset.read(np.arange(count))[:, :-1].ravel(), dataset.read(np.arange(count))[-1, -1])
    assert len(stream) == len(joined) == 7 * count + 1
    for start in [*range(9), len(joined) - 8, len(joined) - 1, len(joined)]:
        for stop in [*range(start, start + 16), len(joined)]:
            np.testing.assert_array_equal(stream[start:stop], joined[start:stop])


def test_words_and_bytes_do_not_depend_on_how_much_is_read_at_once(
    tokenizer: Tokenizer, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert tokenizer.eod_id is not None
    texts = ["one two  three\n", "", "über alles 東京", "last"]
    ids = [id_ for text in texts for id_ in [*tokenizer.encode(text), tokenizer.eod_id]]
    expected = (3 + 3 + 1, sum(len(text.encode()) for text in texts))
    stream = DatasetTokens(IndexedDataset(write_dataset(tmp_path / "data", [ids], manifest=False)))
    for block in (1, 2, 5, len(ids), len(ids) + 1):
        monkeypatch.setattr(perplexity, "COUNTED_AT_ONCE", block)
        assert count_text(stream, tokenizer) == expected
        assert count_text(Part(stream, len(ids) - 1), tokenizer) == expected
        assert count_text(stream, tokenizer, len(ids) - 2)[0] == 1
        found = measure(decoder, stream, tokenizer, stride=3, batch_size=2)
        assert (found.tokens, found.words) == (len(ids) - 1, 7)


@pytest.mark.parametrize("stride", [None, 1, 4, 16])
@pytest.mark.parametrize("length", [17, 18, 31, 32, 33, 34, 50])
def test_batches_hold_all_windows(decoder: Decoder, stride: int | None, length: int) -> None:
    """However many windows fit one batch; the loss of each token counts once."""
    ids = np.arange(length) % 200
    found = [measure(decoder, ids, stride=stride, batch_size=size) for size in (1, 2, 3, 100)]
    assert {each.tokens for each in found} == {length - 1 if stride else (length - 1) // 16 * 16}
    assert all(each.nll_nats == pytest.approx(found[0].nll_nats, rel=1e-5) for each in found)


def test_of_texts_only_the_first_documents_are_read(
    tmp_path: Path, save_run: SaveRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "runs" / "a")
    path = tmp_path / "text.jsonl"
    good = json.dumps({"text": "A document of some words. " * 20}) + "\n"
    path.write_text(good * 3)
    arguments = ["--run", str(run), "--text", str(path), "--max-tokens", "64", "--json"]
    assert evaluate.main(arguments) == 0
    expected = capsys.readouterr().out
    (tmp_path / "later.jsonl").write_text("no JSON\n")
    assert evaluate.main([*arguments[:4], str(tmp_path / "later.jsonl"), *arguments[4:]]) == 0
    assert capsys.readouterr().out == expected


def test_several_runs_are_measured_one_after_the_other(
    tmp_path: Path, save_run: SaveRun, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(save_run(tmp_path / "runs" / name)) for name in "ab"]
    path = tmp_path / "text.txt"
    path.write_text("A document of some words. " * 20)
    alone = []
    for run in runs:
        assert evaluate.main(["--run", run, "--text", str(path), "--json"]) == 0
        alone.append(json.loads(capsys.readouterr().out))
    for given in (["--run", *runs], ["--run", runs[0], "--run", runs[1]], ["--run", f"{tmp_path}/runs/*"]):
        assert evaluate.main([*given, "--text", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == alone
    assert evaluate.main(["--run", *runs, "--text", str(path)]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "step" in line] == [
        f"{each['run']}, step {each['step']:,}: {each['tokens']:,} tokens, the training loop's windows"
        for each in alone
    ]
