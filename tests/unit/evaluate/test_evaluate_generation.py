"""Generated text: greedy against a plain loop, sampling against known distributions."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from megatron_lpa import files
from megatron_lpa.commands import generate
from megatron_lpa.config import ModelConfig
from megatron_lpa.data.tokenizers.opening import Tokenizer
from megatron_lpa.errors import TryAgain, UserError
from megatron_lpa.evaluate.generation import Sampling, _choose, generate_ids, generate_text
from megatron_lpa.model.transformer import Decoder

SaveRun = Callable[..., Path]
VOCAB, S = 300, 16
PROMPT = [5, 80, 33]


class FixedDecoder(nn.Module):
    """Gives the next token the same probabilities whatever came before."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.config = ModelConfig(vocab_size=len(probabilities))
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*tokens.shape, -1)


def frequencies(probabilities: list[float], sampling: Sampling, draws: int = 2000) -> list[float]:
    decoder = cast(Decoder, FixedDecoder(probabilities))
    samples = generate_ids(decoder, [0], replace(sampling, max_new_tokens=1), num_samples=draws)
    counts = Counter(sample[0] for sample in samples)
    return [counts[token] / draws for token in range(len(probabilities))]


def test_greedy_is_the_most_likely_token_of_a_sliding_window(decoder: Decoder) -> None:
    text = list(PROMPT)
    with torch.no_grad():
        for _ in range(2 * S):
            text.append(int(decoder(torch.tensor([text[-S:]]))[0, -1, :VOCAB].argmax()))
    sampling = Sampling(max_new_tokens=2 * S, temperature=0)
    assert generate_ids(decoder, PROMPT, sampling, num_samples=2) == [text[3:]] * 2
    for narrow in (Sampling(2 * S, top_k=1), Sampling(2 * S, top_p=1e-6), Sampling(2 * S, temperature=1e-9)):
        assert generate_ids(decoder, PROMPT, narrow) == [text[3:]]


def test_a_seed_gives_the_same_text_alone_or_among_others(decoder: Decoder) -> None:
    several = generate_ids(decoder, PROMPT, Sampling(24, seed=11), num_samples=3)
    assert several == generate_ids(decoder, PROMPT, Sampling(24, seed=11), num_samples=3)
    assert [several[2]] == generate_ids(decoder, PROMPT, Sampling(24, seed=13))
    assert len({tuple(sample) for sample in several}) == 3


def test_padded_ids_never_appear(decoder: Decoder) -> None:
    with torch.no_grad():
        assert int(decoder(torch.tensor([PROMPT]))[0, -1].argmax()) >= VOCAB, "the head has to prefer one"
    for temperature in (0.0, 1.0, 20.0):
        samples = generate_ids(decoder, PROMPT, Sampling(20, temperature=temperature), num_samples=8)
        assert max(max(sample) for sample in samples) < VOCAB


def test_sampling_follows_the_probabilities() -> None:
    probabilities = [0.5, 0.3, 0.15, 0.05]
    assert frequencies(probabilities, Sampling()) == pytest.approx(probabilities, abs=0.04)
    cold = [p**2 / sum(q**2 for q in probabilities) for p in probabilities]
    assert frequencies(probabilities, Sampling(temperature=0.5)) == pytest.approx(cold, abs=0.04)


def test_top_k_and_top_p_cut_the_tail() -> None:
    probabilities = [0.15, 0.5, 0.05, 0.3]
    assert frequencies(probabilities, Sampling(top_k=2)) == pytest.approx([0, 0.625, 0, 0.375], abs=0.04)
    # 0.5 + 0.3 reaches 0.7; 0.5 alone does not.
    assert frequencies(probabilities, Sampling(top_p=0.7)) == pytest.approx([0, 0.625, 0, 0.375], abs=0.04)
    assert frequencies(probabilities, Sampling(top_p=0.5)) == [0, 1, 0, 0]


@pytest.mark.parametrize("top_p", [1e-46, 1e-300, 5e-324])
def test_the_smallest_share_still_takes_one_token(top_p: float) -> None:
    """In float32 it is 0."""
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    for seed in range(5):
        assert _choose(logits, Sampling(top_p=top_p), [torch.Generator().manual_seed(seed)]).item() == 1


def test_the_lowest_and_the_highest_temperature_are_the_limits_of_all() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    for seed in range(5):
        assert (
            _choose(logits, Sampling(temperature=1.2e-38), [torch.Generator().manual_seed(seed)]).item() == 1
        )
    drawn = {
        _choose(logits, Sampling(temperature=3e38), [torch.Generator().manual_seed(seed)]).item()
        for seed in range(30)
    }
    assert drawn == {0, 1, 2}


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 10**30])
def test_a_seed_out_of_range_is_told(seed: int) -> None:
    with pytest.raises(UserError, match=r"--seed is .*; give 0 or more, below 2\*\*63"):
        Sampling(seed=seed)


def test_the_last_seed_has_a_next_one(decoder: Decoder) -> None:
    last = generate_ids(decoder, [3], Sampling(max_new_tokens=4, seed=2**63 - 1), num_samples=2)
    assert last[1] == generate_ids(decoder, [3], Sampling(max_new_tokens=4, seed=0))[0]


def test_a_sample_ends_at_the_end_of_document() -> None:
    decoder = cast(Decoder, FixedDecoder([0.4, 0.6]))
    sampling = Sampling(max_new_tokens=40, seed=2)
    whole = generate_ids(decoder, [1], sampling, num_samples=6)
    cut = generate_ids(decoder, [1], sampling, num_samples=6, eod_id=0)
    assert cut == [sample[: sample.index(0)] for sample in whole]


def test_an_empty_prompt_starts_a_document(decoder: Decoder, tokenizer: Tokenizer) -> None:
    sampling = Sampling(max_new_tokens=9, temperature=0)
    assert tokenizer.eod_id is not None
    expected = generate_ids(decoder, [tokenizer.eod_id], sampling, eod_id=tokenizer.eod_id)[0]
    assert generate_text(decoder, tokenizer, "", sampling) == [tokenizer.decode(expected)]
    assert generate_text(decoder, tokenizer, "A name", Sampling(0)) == ["A name"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--top-k", "0"),
        ("--top-p", "0"),
        ("--temperature", "-1"),
        ("--num-samples", "0"),
        ("--temperature", "1e-300"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "1e300"),
        ("--top-p", "nan"),
        ("--top-p", "1.1"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
    ],
)
def test_impossible_options_are_errors(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--run", "unread", option, value]) == 78
    assert f"error: {option} is {float(value) if option in ('--top-p', '--temperature') else value};" in (
        capsys.readouterr().err
    )


def test_the_tool_continues_all_prompts(
    tmp_path: Path, save_run: SaveRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "runs" / "a")
    (tmp_path / "prompt.txt").write_text("A function call\n")
    argv = ["--run", str(run), "--prompt", "The name", "--prompt-file", str(tmp_path / "prompt.txt")]
    assert generate.main([*argv, "--max-new-tokens", "3", "--num-samples", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("\nThe name") == 2
    assert out.count("\nA function call") == 2
    with pytest.raises(UserError):
        Sampling(max_new_tokens=-1)


@pytest.mark.timeout(60)  # a pipe that is waited for never answers
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pipe", "a named pipe, not a regular file"), ("device", "a device, not a regular file"),
        ("folder", "a folder, not a regular file"), ("absent", "cannot be read (No such file or directory)"),
        ("bytes", "line 2: not UTF-8 text"), ("long", "more than the"),
    ],
)  # fmt: skip
def test_a_prompt_file_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, words: str
) -> None:
    path = tmp_path / "prompt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "bytes":
        path.write_bytes(b"a\n\xff")
    elif kind == "long":
        with path.open("wb") as file:
            file.truncate(files.MOST_TEXT_BYTES + 1)
    assert generate.main(["--run", "unread", "--prompt-file", str(path)]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --prompt-file {path}") and words in line


def test_a_prompt_file_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"A function\r\ncall\n\n")
    arguments = generate.parse_arguments(["--run", "unread", "--prompt-file", str(tmp_path / "prompt.txt")])
    monkeypatch.setattr(files, "PAUSES_S", (0.0,))
    real, failures = os.open, [errno.EIO]

    def failing(path: Any, *more: Any, **named: Any) -> int:
        if failures and str(path).endswith("prompt.txt"):
            raise OSError(failures.pop(), "Input/output error")
        return real(path, *more, **named)

    monkeypatch.setattr(files.os, "open", failing)
    assert generate.prompts_of(arguments) == ["A function\ncall"]
    failures += [errno.EIO] * 2
    with pytest.raises(TryAgain, match=r"--prompt-file .*prompt\.txt: cannot be read \(Input/output error\)"):
        generate.prompts_of(arguments)
