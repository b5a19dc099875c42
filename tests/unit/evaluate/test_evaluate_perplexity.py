"""Loss per token, word and byte against sums written out by hand."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatron_lpa.commands import evaluate
from megatron_lpa.data.gpt_dataset import GPTDataset
from megatron_lpa.data.storage.indexed import IndexedDataset
from megatron_lpa.data.tokenizers.opening import Tokenizer
from megatron_lpa.errors import UserError
from megatron_lpa.evaluate.perplexity import TextLoss, count_text, ids_of_texts, measure
from megatron_lpa.model.transformer import Decoder
from megatron_lpa.preparation.preprocess import preprocess
from megatron_lpa.preparation.preprocess_config import PreprocessConfig

SaveRun = Callable[..., Path]
VOCAB, S = 300, 16


@pytest.fixture(scope="module")
def text_file(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*documents, ""]))
    return path


@pytest.fixture(scope="module")
def dataset(text_file: Path, tokenizer_folder: Path) -> IndexedDataset:
    prefix = str(text_file.with_name("data"))
    preprocess(
        PreprocessConfig(prefix, str(tokenizer_folder), (str(text_file),), append_eod=True, log_interval=0)
    )
    return IndexedDataset(f"{prefix}_text_document")


@pytest.fixture(scope="module")
def nll(decoder: Decoder) -> Callable[[np.ndarray], torch.Tensor]:
    """Losses of all ids but the first, in float64, over the real vocabulary."""
    exact = copy.deepcopy(decoder).double()

    def losses(ids: np.ndarray) -> torch.Tensor:
        tokens = torch.from_numpy(ids.astype(np.int64))
        with torch.no_grad():
            logits = exact(tokens[None, :-1])[0, :, :VOCAB]
        return functional.cross_entropy(logits, tokens[1:], reduction="none")

    return losses


def test_default_windows_are_the_samples_of_training(
    decoder: Decoder, dataset: IndexedDataset, nll: Callable[[np.ndarray], torch.Tensor]
) -> None:
    samples = GPTDataset(dataset, (0, dataset.num_documents), S, seed=1)
    expected = sum(float(nll(samples.sample(k)).sum()) for k in range(samples.num_samples))
    assert (dataset.num_tokens - 1) % S, "the end of the stream has to be cut off"
    for batch_size in (1, 7):
        result = measure(decoder, dataset.tokens(0, dataset.num_tokens), batch_size=batch_size)
        assert result.tokens == samples.num_samples * S
        assert result.nll_nats == pytest.approx(expected, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(expected / result.tokens), rel=1e-5)


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_sliding_windows_predict_every_token_once_with_context(
    decoder: Decoder, dataset: IndexedDataset, nll: Callable[[np.ndarray], torch.Tensor], stride: int
) -> None:
    ids = dataset.tokens(0, 4 * S + 3)
    expected = 0.0
    for token in range(1, len(ids)):
        # The first window, of those every `stride` tokens, whose S labels reach this token.
        begin = max(0, math.ceil((token - S) / stride)) * stride
        assert token <= S or token - begin >= S - stride + 1
        expected += float(nll(ids[begin : token + 1])[-1])
    result = measure(decoder, ids, stride=stride, batch_size=3)
    assert result.tokens == len(ids) - 1
    assert result.nll_nats == pytest.approx(expected, rel=1e-5)


def test_a_text_shorter_than_the_window(
    decoder: Decoder, dataset: IndexedDataset, nll: Callable[[np.ndarray], torch.Tensor]
) -> None:
    ids = dataset.tokens(0, 6)
    assert measure(decoder, ids, stride=S).nll_nats == pytest.approx(float(nll(ids).sum()), rel=1e-5)
    with pytest.raises(UserError, match=r"6 tokens are too few.*--stride 16"):
        measure(decoder, ids)
    with pytest.raises(UserError, match=r"--stride is 17"):
        measure(decoder, ids, stride=17)


def test_an_id_the_model_does_not_know(decoder: Decoder) -> None:
    with pytest.raises(UserError, match=r"token id 300 but the model knows ids 0 to 299"):
        measure(decoder, np.full(40, 300))


def test_ratios_by_hand() -> None:
    result = TextLoss(nll_nats=24 * math.log(2), tokens=6, words=3, text_bytes=12)
    assert result.perplexity == pytest.approx(2**4)
    assert result.word_perplexity == pytest.approx(2**8)
    assert result.bits_per_byte == pytest.approx(2.0)


def test_words_and_bytes_are_those_of_the_predicted_tokens(decoder: Decoder, tokenizer: Tokenizer) -> None:
    assert tokenizer.eod_id is not None
    texts = ["one two  three\n", "über alles 東京", "last"]
    ids = [id_ for text in texts for id_ in [*tokenizer.encode(text), tokenizer.eod_id]]
    assert count_text(np.array(ids), tokenizer) == (3 + 3 + 1, sum(len(text.encode()) for text in texts))
    result = measure(decoder, np.array([tokenizer.eod_id, *ids]), tokenizer, stride=S)
    assert (result.tokens, result.words) == (len(ids), 7)
    first = measure(decoder, np.array([tokenizer.eod_id, *ids]), tokenizer, stride=S, max_tokens=4)
    assert first.text_bytes == len(tokenizer.decode(ids[:4]).encode())


def test_text_becomes_the_ids_that_preprocessing_writes(
    dataset: IndexedDataset, text_file: Path, tokenizer: Tokenizer
) -> None:
    ids = ids_of_texts([str(text_file)], tokenizer)
    np.testing.assert_array_equal(ids, dataset.tokens(0, dataset.num_tokens))


def test_the_tool_on_text_and_on_data(
    tmp_path: Path,
    save_run: SaveRun,
    dataset: IndexedDataset,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = save_run(tmp_path / "runs" / "a")
    by_source = []
    for source in (["--text", str(text_file)], ["--data", dataset.prefix]):
        assert evaluate.main(["--run", str(run), *source, "--json"]) == 0
        by_source.append(json.loads(capsys.readouterr().out))
    assert by_source[0] == by_source[1]
    assert by_source[0]["bits_per_byte"] == pytest.approx(
        by_source[0]["nll_nats"] / math.log(2) / by_source[0]["text_bytes"]
    )
    bare = save_run(tmp_path / "runs" / "b", tokenizer=None)
    assert evaluate.main(["--run", str(bare), "--data", dataset.prefix]) == 0
    assert "per word and byte   not measured" in capsys.readouterr().out
    assert evaluate.main(["--run", str(bare), "--text", str(text_file)]) == 78
    assert "error: " in capsys.readouterr().err
