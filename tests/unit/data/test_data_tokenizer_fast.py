"""The fast engine against the libraries it stands for."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from test_data_tokenizer_texts import LLAMA3_PATTERN, breaking_texts, random_texts
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from megatron_lpa.data.tokenizers import fast as fast_tokenizer
from megatron_lpa.data.tokenizers.fast import FastTokenizer, first_difference
from megatron_lpa.data.tokenizers.gigatoken_engine import GigatokenEngine, build_from_json
from megatron_lpa.data.tokenizers.opening import load_tokenizer
from megatron_lpa.data.tokenizers.probe import probe_texts
from megatron_lpa.data.tokenizers.tokenizer import Tokenizer
from megatron_lpa.errors import UserError


def train_sentencepiece(prose: list[str], file: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {
        "vocab_size": 600, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
    }  # fmt: skip
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(prose[:30]).splitlines()),
        model_writer=model,
        **(settings | options),
    )
    file.write_bytes(model.getvalue())
    return file


def train_bpe(prose: list[str], file: Path, normalizer: Any = None, pre_tokenizer: Any = None) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*prose[:20], *breaking_texts()], trainer)
    tokenizer.save(str(file))
    return file


def changed(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def assert_same(fast: Tokenizer, texts: list[str], expected: list[list[int]]) -> None:
    ids, sizes = fast.encode_batch_arrays(texts)
    assert (ids.dtype, ids.ndim, sizes.dtype, sizes.shape) == (np.uint32, 1, np.int64, (len(texts),))
    assert fast.encode_batch(texts) == expected
    assert ids.tolist() == [number for part in expected for number in part]
    assert sizes.tolist() == [len(part) for part in expected]


def test_ids_are_those_of_tokenizers(bpe_folder: Path, prose: list[str]) -> None:
    fast = load_tokenizer(str(bpe_folder), engine="auto")
    theirs = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    texts = [*breaking_texts(), *random_texts(2500), *prose[:30]]
    assert (fast.engine, fast.fallback_reason) == ("gigatoken", None)
    assert_same(fast, texts, [encoding.ids for encoding in theirs.encode_batch(texts)])
    for one in ([], [""], ["", ""], ["a"], ["", "a", ""], ["\U000323b0's", "", "x"]):
        assert_same(fast, one, [encoding.ids for encoding in theirs.encode_batch(one)])
    reference = load_tokenizer(str(bpe_folder))
    for attribute in ("name", "vocab_size", "eod_id", "fingerprint"):
        assert getattr(fast, attribute) == getattr(reference, attribute)
    assert fast.encode("Hello <|endoftext|>") == reference.encode("Hello <|endoftext|>")
    assert fast.decode(fast.encode("naïve 🙂")) == "naïve 🙂"


def test_ids_are_those_of_sentencepiece(prose: list[str], tmp_path: Path) -> None:
    file = train_sentencepiece(prose, tmp_path / "x.model", control_symbols=["<ctl>"])
    fast = load_tokenizer(str(file), engine="auto")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert (fast.engine, fast.fallback_reason) == ("gigatoken", None)
    texts = [*breaking_texts(), *random_texts(2500), *prose[:30]]
    texts += ["a<s>b", "</s>", "<s", "<ctl>", "▁<s>", "<unk>", "<0x41>"]
    assert_same(fast, texts, theirs.encode(texts))


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_lines_of_a_megabyte(kind: str, bpe_folder: Path, prose: list[str], tmp_path: Path) -> None:
    name = bpe_folder if kind == "bpe" else train_sentencepiece(prose, tmp_path / "x.model")
    letters = np.random.default_rng(0).integers(97, 123, 200_000, dtype=np.uint8).tobytes().decode()
    million = " ".join(prose).replace("\n", " ")[:1_000_000]
    texts = [
        million,
        letters,
        "a" * 200_000,
        " " * 200_000,
        "\u200b" * 100_000,
        "語" * 100_000,
        "e\u0301\u0323" * 50_000,
    ]
    fast, reference = load_tokenizer(str(name), engine="auto"), load_tokenizer(str(name))
    assert fast.engine == "gigatoken"
    assert_same(fast, texts, reference.encode_batch(texts))


@pytest.mark.parametrize("pattern", ["gpt2", "llama3"])
@pytest.mark.parametrize("form", [None, "NFC"])
def test_every_code_point(pattern: str, form: str | None, prose: list[str], tmp_path: Path) -> None:
    """The engines have Unicode tables of different versions; texts with points that differ are put aside."""
    split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    train_bpe(
        prose,
        tmp_path / "tokenizer.json",
        normalizers.NFC() if form else None,
        pre_tokenizers.Sequence([split, level]) if pattern == "llama3" else None,
    )
    fast, reference = load_tokenizer(str(tmp_path), engine="auto"), load_tokenizer(str(tmp_path))
    assert isinstance(fast, FastTokenizer), fast.fallback_reason
    step = 3 if form else 7
    points = [*range(0, 0xD800, step), *range(0xE000, 0x33500, step), *range(0x33500, 0x110000, 9973)]
    texts = [f"a{chr(point)}'s {chr(point)}1\n{chr(point)}\u0334\u0345{chr(point)}" for point in points]
    given = [text for text in texts if not fast.for_reference(text)]
    assert first_difference(reference, fast.encode_batch_arrays, given) is None
    assert len(given) > 0.5 * len(texts)
    assert not any(map(fast.for_reference, prose))


FALLBACKS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "dropout": (lambda c: c["model"].update(dropout=0.001), r"does not know dropout=0\.001"),
    "suffix": (lambda c: c["model"].update(end_of_word_suffix="</w>"), r"end_of_word_suffix='</w>'"),
    "lowercase": (lambda c: c.update(normalizer={"type": "Lowercase"}), r"cannot read it \(.*Lowercase"),
    "bert": (
        lambda c: c.update(normalizer=json.loads(normalizers.BertNormalizer().__getstate__())),
        r"cannot read it \(.*BertNormalizer",
    ),
    "no pattern": (lambda c: c["pre_tokenizer"].update(use_regex=False), r"pre_tokenizer without a pattern"),
    "removed": (
        lambda c: c.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Removed",
                    "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                    "use_regex": False},
                ],
            }
        ),
        r"other ids for the text ' '",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FALLBACKS)
def test_what_gigatoken_does_otherwise_stays_with_tokenizers(
    case: str, prose: list[str], tmp_path: Path
) -> None:
    change, reason = FALLBACKS[case]
    changed(train_bpe(prose, tmp_path / "tokenizer.json"), change)
    tokenizer = load_tokenizer(str(tmp_path), engine="auto")
    assert tokenizer.engine == "tokenizers"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(tokenizer.fallback_reason)
    if case not in ("dropout", "suffix"):  # by chance; a file that tokenizers itself cannot use
        assert tokenizer.encode("Hello") == load_tokenizer(str(tmp_path)).encode("Hello")


@pytest.mark.parametrize(
    "options", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}]
)
@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_are_found_as_by_tokenizers(
    options: dict[str, bool], special: bool, bpe_folder: Path, tmp_path: Path
) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(bpe_folder / "tokenizer.json"))
    words = ["<mask>", "the the", "日本", "    ", "ab", "abc"]
    add = theirs.add_special_tokens if special else theirs.add_tokens
    add([AddedToken(word, **({"normalized": False} | options)) for word in words])
    theirs.save(str(tmp_path / "tokenizer.json"))
    fast = load_tokenizer(str(tmp_path), engine="auto")
    if "single_word" in options:
        assert fast.engine == "tokenizers"
    if options in ({}, {"normalized": True}):
        assert fast.engine == "gigatoken"
    texts = [*random_texts(400, extra=words), "abcabab c", " <mask>  x", "日本語 日本", "x the the\n"]
    assert_same(fast, texts, [encoding.ids for encoding in theirs.encode_batch(texts)])


def test_pieces_of_words_stay_with_tokenizers(prose: list[str], tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE(continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        prose[:5],
        trainers.BpeTrainer(vocab_size=400, continuing_subword_prefix="##", show_progress=False),
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reason = load_tokenizer(str(tmp_path), engine="auto").fallback_reason
    assert reason is not None and "does not know continuing_subword_prefix='##'" in reason


def test_other_models_stay_with_their_libraries(prose: list[str], tmp_path: Path) -> None:
    for number, (model, trainer) in enumerate(
        (
            (
                models.WordPiece(unk_token="[UNK]"),
                trainers.WordPieceTrainer(vocab_size=200, show_progress=False),
            ),
            (models.Unigram(), trainers.UnigramTrainer(vocab_size=200, show_progress=False)),
        )
    ):
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.train_from_iterator(prose[:5], trainer)
        tokenizer.save(str(tmp_path / f"{number}.json"))
        assert load_tokenizer(str(tmp_path / f"{number}.json"), engine="auto").engine == "tokenizers"
    for number, (options, reason) in enumerate(
        (
            ({"normalization_rule_name": "nmt_nfkc"}, "other ids for the text"),
            ({"remove_extra_whitespaces": True}, "other ids for the text"),
            ({"user_defined_symbols": ["<mask>"]}, "other ids for the text '<mask>'"),
            ({"byte_fallback": False}, "cannot read it (only byte_fallback"),
            ({"model_type": "unigram"}, "cannot read it (only BPE"),
        )
    ):
        file = train_sentencepiece(prose, tmp_path / f"{number}.model", **options)  # type: ignore[arg-type]
        tokenizer_ = load_tokenizer(str(file), engine="auto")
        assert tokenizer_.engine == "sentencepiece"
        assert reason in str(tokenizer_.fallback_reason)
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
        assert_same(tokenizer_, breaking_texts(), theirs.encode(breaking_texts()))


def test_a_missing_gigatoken_is_no_error(bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = load_tokenizer(str(bpe_folder), engine="auto")
    assert tokenizer.engine == "tokenizers"
    assert "gigatoken is not installed" in str(tokenizer.fallback_reason)


def test_a_panic_of_gigatoken_is_no_end(bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PanicException", "KeyboardInterrupt"):
        kind = type(name, (BaseException,), {})

        def fail(data: bytes, kind: type[BaseException] = kind) -> None:
            raise kind("index out of bounds\nstack")

        monkeypatch.setattr(fast_tokenizer, "build_from_json", fail)
        if name == "KeyboardInterrupt":
            with pytest.raises(kind):
                load_tokenizer(str(bpe_folder), engine="auto")
            continue
        reason = load_tokenizer(str(bpe_folder), engine="auto").fallback_reason
        assert reason == "gigatoken cannot read it (index out of bounds); tokenizers encodes instead"


class FakeEngine:
    """The reference's ids, but wrong ones for texts in which ``wrong`` occurs; remembers what it was
    given."""

    def __init__(self, reference: Tokenizer, wrong: str) -> None:
        self.reference, self.wrong = reference, wrong
        self.given: list[str] = []

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        self.given += texts
        return self.reference.encode_batch_arrays([text.replace(self.wrong, "?") for text in texts])


def test_known_differences_go_to_the_reference(bpe_folder: Path) -> None:
    reference = load_tokenizer(str(bpe_folder))
    engine = FakeEngine(reference, "bad")
    fast = FastTokenizer(reference, engine, lambda text: "bad" in text)
    texts = ["one", "bad two", "", "a bad", "bad", "three"]
    assert_same(fast, texts, reference.encode_batch(texts))
    assert set(engine.given) == {"one", "", "three"}
    assert_same(fast, ["bad", "bad"], reference.encode_batch(["bad", "bad"]))


def test_wrong_ids_in_the_run_stop_it(bpe_folder: Path) -> None:
    reference = load_tokenizer(str(bpe_folder))
    fast = FastTokenizer(reference, FakeEngine(reference, "bad"), lambda text: False, 10_000)
    fast.encode_batch_arrays(["fine"])
    assert fast.checks == 1  # the first text
    for _ in range(30):
        fast.encode_batch_arrays(["", "all is well " * 50, ""])
    assert fast.checks == 2  # 18,004 characters, every 10,000
    with pytest.raises(UserError, match=r"other ids than tokenizers for the text 'bad.*--engine reference"):
        for _ in range(100):
            fast.encode_batch_arrays(["bad words " * 20])


def test_long_texts_are_checked_in_pieces(bpe_folder: Path) -> None:
    reference = load_tokenizer(str(bpe_folder))
    engine = FakeEngine(reference, "bad")
    fast = FastTokenizer(reference, engine, lambda text: False, 10_000)
    for _ in range(20):
        fast.encode_batch_arrays(["good words " * 2000])
    pieces = [text for text in engine.given if len(text) == 2048]
    assert fast.checks == len(pieces) == 20
    assert len(set(pieces)) > 5
    with pytest.raises(UserError, match=r"\(2048 characters\)"):
        fast.encode_batch_arrays(["bad words " * 2000])


def test_a_difference_in_the_probe_is_named(bpe_folder: Path) -> None:
    reference = load_tokenizer(str(bpe_folder))
    engine = FakeEngine(reference, "Ё")
    texts = probe_texts(["<|endoftext|>"], lambda text: False)
    assert "Ё" in str(first_difference(reference, engine, texts))


def test_memory_is_bounded(bpe_folder: Path, prose: list[str]) -> None:
    data = (bpe_folder / "tokenizer.json").read_bytes()
    builds = 0

    def build() -> Any:
        nonlocal builds
        builds += 1
        return build_from_json(data)

    text = " ".join(prose)[:500_000]
    free, bounded = GigatokenEngine(build), GigatokenEngine(build, limit_bytes=-(2**50))
    expected = free([text])[0]
    for _ in range(6):
        assert np.array_equal(free([text])[0], expected)
        assert np.array_equal(bounded([text])[0], expected)
    assert free.builds == 1
    assert bounded.builds == 3  # looks once in a million characters
    assert builds == 4
