"""Configurations that nobody sensible wrote: one short line each, in no time, and nothing they can start."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import random
import stat
import time
from pathlib import Path

import pytest

from megatron_lpa import files
from megatron_lpa.config import RunConfig, load_config, preset_names, save_config, validate_config
from megatron_lpa.config.validation import _raise_batch
from megatron_lpa.errors import MOST_SHOWN, TryAgain, UserError, named, shown

LONGEST = 400
"""Characters of a message, besides the path of a file."""


def refusal(argv: list[str], validate: bool = False) -> str:
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        config = load_config(argv)
        if validate:
            validate_config(config, None, need_data=False)
    assert not isinstance(caught.value, TryAgain)
    text = str(caught.value)
    assert "\n" not in text and len(text) < LONGEST + sum(len(a) for a in argv if a.endswith(".yaml")), text[
        :1000
    ]
    assert time.monotonic() - started < 5
    return text


def write(folder: Path, text: str | bytes) -> list[str]:
    path = folder / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["--config", str(path)]


def bomb(first: str, next_one: str, levels: int = 12) -> str:
    """Each of ten aliases stands for ten of the line before."""
    lines = [f"x0: &x0 {first}"]
    for level in range(1, levels):
        lines.append(f"x{level}: &x{level} " + next_one % ",".join([f"*x{level - 1}"] * 10))
    return "\n".join(lines)


STRANGE = {
    "deep lists": ("model: " + "[" * 100_000, ["line 1", "nested deeper than the 20 levels"]),
    "deep mappings": ("{model: " * 50_000, ["nested deeper"]),
    "deep blocks": ("".join(" " * i + "model:\n" for i in range(500)), ["line 20", "nested deeper"]),
    "alias bomb": (bomb("[1]", "[%s]"), ["line 5", "more than 20,000 values"]),
    "merge bomb": (bomb("{k: 1}", "{<<: [%s]}"), ["line 5", "more than 20,000 values"]),
    "an alias of itself": ("model: &a\n  vocab_size: *a", ["line 1", "an alias of what it lies in"]),
    "a merge of itself": ("model: &a {<<: *a}", ["an alias of what it lies in"]),
    "a list as a key": ("model:\n  ? [vocab_size]\n  : 1", ["line 2", "a key is a name"]),
    "a mapping as a key": ("? {a: 1}\n: 1", ["line 1", "a key is a name"]),
    "an object": ("model: !!python/object/apply:os.system [ls]", ["python/object/apply:os.system",
    "leave it out"]),
    "bytes": ("data: {prefix: !!binary aGk=}", ["binary"]),
    "a date": ("data: {prefix: !!timestamp 2020-01-01}", ["timestamp"]),
    "a set": ("model: !!set {vocab_size}", ["set"]),
    "no whole number": ("train: {steps: !!int x}", ["int"]),
    "a long tag": ("model: !" + "x" * 9000 + " 1", ["!xxx"]),
    "a long alias": ("model: *" + "x" * 9000, ["undefined alias"]),
    "two documents": ("train: {steps: 1}\n---\ntrain: {steps: 2}", ["line 2", "several documents"]),
    "many digits": ("train:\n  steps: " + "9" * 100_000, ["line 2", "100,000 digits"]),
    "a number of no character": ('logging: {name: "\\UFFFFFFFF"}', ["line 1", "no character"]),
    "NUL in a file": ("train: {steps: 1}\nlogging: {name: a\0b}", ["line 2", r"'\x00'"]),
    "NUL in a name": ('logging: {name: "a\\0b"}', ["logging.name", r"'a\x00b'", "mine.yaml"]),
    "NUL in a path": ('data: {prefix: "a\\0b"}', ["data.prefix", r"'a\x00b'"]),
    "NUL in a dataset of a blend": ('data: {blend: {"a\\0b": 1}}', ["data.blend", r"'a\x00b'"]),
    "a line's end in a name": ('logging: {name: "a\\nb"}', ["logging.name", r"'a\nb'"]),
    "half a character": ('logging: {name: "a\\ud800b"}', ["logging.name", r"'a\ud800b'"]),
    "a line's end in a key": ('"a\\nerror: b": 1', [r"'a\nerror: b'"]),
    "a long key": ("x" * 1000 + ": 1", ["unknown key xxx"]),
    "a key of no text": ("12: 1", ["unknown key 12"]),
    "a large value": ("data: {prefix: " + "x" * 900_000 + "}", ["data.prefix", "900,000 characters"]),
    "a large list": ("model: {vocab_size: [" + "1," * 10_000 + "]}", ["model.vocab_size", "whole number"]),
    "too many values": ("model: [" + "1," * 200_000 + "]", ["more than 20,000 values"]),
    "a large file": ("#" * (1 << 20) + "\ntrain: {steps: 1}", ["more than the 1,048,576"]),
    "not UTF-8": (b"train:\n  steps: \xff", ["line 2", "not UTF-8"]),
    "a number beyond 64 bits": ("train: {seed: 9223372036854775808}", ["train.seed", "below 2**63"]),
    "a number beyond a float": ("optim: {lr: 1e999}", ["optim.lr", "a number"]),
    "a sum that is a number's end": ("data: {blend: {a: " + "9" * 90 + ", 1: 2}}", ["data.blend"]),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), STRANGE.values(), ids=STRANGE)
def test_a_strange_file_is_one_short_line(tmp_path: Path, text: str, expected: list[str]) -> None:
    said = refusal(write(tmp_path, text))
    assert all(part in said for part in expected), said
    assert any(name in said for name in ("mine.yaml", "model.", "data."))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--train.steps", "1e9999999"], ["train.steps", "1e9999999", "below 2**63"]),
        (["--train.steps=-1e9999999"], ["train.steps", "below 2**63"]),
        (["--train.steps", "1e-9999999"], ["train.steps is '1e-9999999'", "whole number"]),
        (["--train.steps", "9" * 5000], ["train.steps", "999...", "5,000 characters"]),
        (["--optim.lr", "[" * 4000], ["optim.lr", "[[[...", "a number"]),
        (["--model.norm", "x" * 4000], ["model.norm", "xxx...", "layernorm"]),
        (["--data.prefix", "x" * 100_000], ["data.prefix", "100,000 characters"]),
        (["--data.prefix", "a\udcffb"], ["data.prefix", r"'a\udcffb'"]),
        (["--data.blend", "[" * 4000], ["data.blend (command line), line 1", "nested deeper"]),
        (["--data.blend", "{a: &a [*a]}"], ["data.blend", "an alias"]),
        (["--data.blend", "{a: !!python/name:os.system ''}"], ["data.blend", "python/name"]),
        (["--" + "x" * 100_000, "1"], ["unknown option --xxx", "..."]),
        (["x" * 100_000], ["unexpected argument 'xxx", "..."]),
        (["--config", "x" * 5000], ["cannot read the configuration xxx", "too long"]),
        (["--config", "a\0b"], [r"'a\x00b'", "NUL"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_strange_command_line_is_one_short_line(argv: list[str], expected: list[str]) -> None:
    said = refusal(argv, validate=True)
    assert all(part in said for part in expected), said


@pytest.mark.parametrize(
    "text", ["&a", "*a", "!x", "[", "{a: 1}", "- 1", "? x", "'", "|", "%a", "@", "<<", "1e3"]
)
def test_text_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    """No second reading as YAML, of which ``&a`` is nothing."""
    config = load_config(["--data.prefix", text, "--logging.name", "n"])
    assert config.data.prefix == text
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


GOOD = ["--preset", "tiny/lpa"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--optim.lr=1e308"], ["optim.lr is 1e+308", "at most 3.40282e+38"]),
        (["--optim.eps=1e-60"], ["optim.eps is 1e-60", "in float32 it is 0"]),
        (["--model.norm_eps=1e-300"], ["model.norm_eps", "float32"]),
        (["--model.init_std=1e39"], ["model.init_std"]),
        (["--optim.weight_decay=1e300"], ["optim.weight_decay"]),
        (["--optim.weight_decay=1000", "--optim.lr=1e-3"], ["optim.weight_decay is 1000.0", "below 1"]),
        (["--optim.grad_clip=1e39"], ["optim.grad_clip"]),
        (["--optim.beta1=1"], ["optim.beta1 is 1.0", "below 1"]),
        (["--optim.beta2=0.9999999999"], ["optim.beta2 is 0.9999999999", "below 1"]),
        (["--model.dropout=0.9999999999"], ["model.dropout", "below 1"]),
        (["--model.dropout=-1e-9"], ["model.dropout is -1e-09", "at least 0"]),
        (["--model.hidden_size=1e15"], ["model.hidden_size is 1000000000000000", "2,147,483,647"]),
        (["--model.projections.q.rank=1e18"], ["model.projections.q.rank"]),
        (["--train.step_timeout_s=1e300"], ["train.step_timeout_s", "0 waits for ever"]),
        (["--train.start_timeout_s=1e12"], ["train.start_timeout_s", "0 waits for ever"]),
        (["--train.start_timeout_s=-5"], ["train.start_timeout_s", "at least 0"]),
        (["--train.start_timeout_s=0.001"], ["train.start_timeout_s", "less than a second"]),
        (["--train.epochs=1e300"], ["train.epochs is 1e+300", "1,000,000,000"]),
        (["--train.steps=1e18"], ["1,000,000,000,000,000,000 steps", "2**62"]),
        (["--train.global_batch_size=1e18"], ["train.global_batch_size"]),
        (["--data.split=1e308,1e308,1"], ["data.split"]),
        (["--data.blend={a: 1e308, b: 1e308}"], ["data.blend", "sum"]),
        (["--data.prefix=" + "x" * 201], ["data.prefix", "200 bytes"]),
        (["--data.blend={" + "x" * 201 + ": 1}"], ["data.blend", "200 bytes"]),
        (["--data.cache_dir=" + "x/" * 1600], ["data.cache_dir", "3,000 bytes"]),
        (["--logging.run_dir="], ["logging.run_dir is ''"]),
        (["--logging.name=../../x"], ["logging.name is '../../x'", "one folder", "without '/'"]),
        (["--logging.name=/etc"], ["logging.name is '/etc'", "one folder"]),
        (["--logging.name=.."], ["logging.name is '..'", "one folder"]),
        (["--logging.name="], ["logging.name is ''", "one folder"]),
        (["--logging.name=" + "é" * 101], ["logging.name", "200 bytes"]),
        (["--logging.wandb=offline", "--logging.wandb_project=a/b"], ["logging.wandb_project", "W&B"]),
    ],
)  # fmt: skip
def test_values_that_cannot_work_are_refused(overrides: list[str], expected: list[str]) -> None:
    said = refusal([*GOOD, *overrides], validate=True)
    assert all(part in said for part in expected), said


def test_a_batch_of_billions_is_answered_at_once_and_as_a_search_would() -> None:
    train = load_config([*GOOD, "--train.steps=1"]).train

    def answer(batch: int, micro: int, processes: int) -> str:
        with pytest.raises(UserError) as caught:
            _raise_batch(
                dataclasses.replace(train, global_batch_size=batch, micro_batch_size=micro), processes
            )
        return str(caught.value)

    started = time.monotonic()
    answer(2**31 - 1, 2**30, 1_000_003)
    assert time.monotonic() - started < 2
    for batch, micro, processes in itertools.product(range(1, 30), range(1, 8), range(1, 7)):

        def whole(sequences: int, micro: int = micro, processes: int = processes) -> bool:
            share, rest = divmod(sequences, processes)
            return not rest and share > 0 and (share < micro or not share % micro)

        near = [
            next((n for n in range(batch - 1, 0, -1) if whole(n)), 0),
            next(n for n in range(batch + 1, 1000) if whole(n)),
        ]
        fitting = [n for n in range(1, batch + 1) if batch % (n * processes) == 0]
        fitting = sorted(sorted(fitting, key=lambda n: abs(n - micro))[:2])
        words = "set it to " + " or ".join(str(n) for n in near if n)
        words += f", or train.micro_batch_size to {' or '.join(map(str, fitting))}" if fitting else ""
        assert answer(batch, micro, processes).endswith(words)


def test_anchors_and_merges_still_work_in_any_order(tmp_path: Path) -> None:
    """PyYAML writes a merge into the mapping that is merged, whose own key then looked repeated."""
    argv = write(
        tmp_path,
        "model:\n  projections:\n    q: &q {kind: lowdim, rank: 4}\n    k: &k {<<: *q, rank: 5}\n"
        "    v: {<<: *k}\n    o: {<<: [*k, *q], rank: 6}\n",
    )
    projections = load_config(argv).model.projections
    assert [projections.q.rank, projections.k.rank, projections.v.rank, projections.o.rank] == [4, 5, 5, 6]
    deep = write(tmp_path, "train: {steps: 1}\noptim: {<<: {lr: 1, <<: {eps: 2}}, lr: 3}")
    assert (load_config(deep).optim.lr, load_config(deep).optim.eps) == (3.0, 2.0)


def test_shipped_presets_bent_at_random_end_in_one_line(tmp_path: Path) -> None:
    """No traceback and no waiting, whatever bytes change; what still loads can be saved and read back."""
    draw = random.Random(5)
    text = (Path(files.__file__).parent / "presets" / "s1_small.yaml").read_bytes()
    pieces = [
        b"!!",
        b"&a ",
        b"*a",
        b"<<: ",
        b"? ",
        b"---\n",
        b"\t",
        b"{",
        b"[",
        b"\n",
        b": ",
        b"\0",
        b"\xff",
        b"9" * 200,
    ]
    for _ in range(150):
        bent = bytearray(text)
        for _ in range(draw.choice([1, 2, 6])):
            at = draw.randrange(len(bent))
            bent[at : at + draw.randrange(3)] = draw.choice([*pieces, bytes([draw.randrange(256)])])
        try:
            config = load_config(write(tmp_path, bytes(bent)))
            save_config(config, tmp_path / "saved.yaml")
            assert load_config(["--config", str(tmp_path / "saved.yaml")]) == config
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < LONGEST + len(str(tmp_path))


def test_a_long_preset_name_is_cut() -> None:
    with pytest.raises(UserError) as caught:
        load_config(["--preset", "x" * 100_000])
    assert len(str(caught.value)) < 100 + MOST_SHOWN + len(", ".join(preset_names()))


def test_presets_keep_to_the_bounds() -> None:
    for name in preset_names():
        validate_config(load_config(["--preset", name]), None, need_data=False)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (
        (tmp_path / "pipe", "a named pipe"),
        (tmp_path, "a folder"),
        (Path("/dev/zero"), "a device"),
    ):
        assert kind in refusal(["--config", str(path)])


def test_a_disk_that_hiccups_is_asked_again_and_is_no_bad_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = write(tmp_path, "train: {steps: 7}")
    real, refusals = os.open, []

    def faulty(path: str, *arguments: int, **keywords: int) -> int:
        if os.fspath(path) == argv[1] and (lasting or len(refusals) < 3):
            refusals.append(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(files, "PAUSES_S", (0, 0, 0))
    monkeypatch.setattr(os, "open", faulty)
    lasting = False
    assert load_config(argv).train.steps == 7 and len(refusals) == 3
    lasting = True
    with pytest.raises(TryAgain, match=r"mine\.yaml: cannot be read"):
        load_config(argv)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_saved_config_has_the_umasks_permissions(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_config(RunConfig(), tmp_path / "config.yaml")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) == 0o666 & ~umask


def test_saving_follows_no_link_and_tidies_what_earlier_versions_left(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.yaml.partial").symlink_to(other)
    (run / ".config.yaml.abcd_123").write_text("left")
    kept = [
        run / name for name in (".config.yaml.backup", ".config.yaml.mine.abcd_123", "config.yaml.abcd_123")
    ]
    for path in kept:
        path.write_text("mine")
    (run / ".config.yaml.abcd_124").symlink_to(other)
    save_config(RunConfig(), run / "config.yaml")
    assert other.read_text() == "precious"
    assert {p.name for p in run.iterdir()} == {
        "config.yaml",
        ".config.yaml.abcd_124",
        *(p.name for p in kept),
    }


def test_values_and_names_in_messages_are_cut_and_on_one_line() -> None:
    assert shown("a") == "'a'" and shown("a\nb") == r"'a\nb'" and shown(None) == "None"
    assert named("a.b") == "a.b" and named("a\nb") == r"'a\nb'" and named(Path("a")) == "a"
    for value in ("x" * 10**6, "\n" * 10**6, [1] * 10**5):
        assert len(shown(value)) == MOST_SHOWN and shown(value).endswith("...")
        assert len(named(value)) == MOST_SHOWN
