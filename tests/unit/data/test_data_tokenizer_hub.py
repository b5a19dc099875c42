"""Names of the Hugging Face hub, without network."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from megatron_lpa.data.tokenizers import hub as tokenizer_hub
from megatron_lpa.data.tokenizers.opening import load_tokenizer
from megatron_lpa.errors import UserError


class Hub:
    """Stands for the hub's client: ``answer`` to the question whether a file is there, files in the cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Any, folder: Path | None = None) -> None:
        self.answer, self.folder, self.asked = answer, folder, 0
        self.local: list[bool] = []
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", self.metadata)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def metadata(self, url: str, timeout: float) -> None:
        assert url.endswith("/resolve/main/tokenizer.json") and 0 < timeout <= 10
        self.asked += 1
        if callable(self.answer):
            self.answer()
        elif self.answer is not None:
            raise self.answer

    def download(self, name: str, file: str, local_files_only: bool) -> str:
        self.local.append(local_files_only)
        if self.folder is None or not (self.folder / file).is_file():
            raise LocalEntryNotFoundError("not in the cache")
        return str(self.folder / file)


def test_a_hub_name_reads_the_hubs_files(bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, None, bpe_folder)
    ours = load_tokenizer("someone/some-tokenizer")
    assert (ours.name, ours.eod_id, hub.local) == ("someone/some-tokenizer", 0, [False, False])
    assert ours.encode("Hello world") == load_tokenizer(str(bpe_folder)).encode("Hello world")
    assert load_tokenizer("gpt2").name == "gpt2"


def test_the_cache_serves_without_network(
    bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, ConnectionError("no route"), tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((bpe_folder / "tokenizer.json").read_bytes())
    assert load_tokenizer("someone/some-tokenizer").eod_id == 0  # without tokenizer_config.json too
    assert (hub.asked, hub.local) == (1, [True, True])


def test_a_mistyped_path_does_not_wait_for_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, AssertionError("must not ask"))
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'data/tokeniser': no such file or folder here.*hub.*'data' exists"):
        load_tokenizer("data/tokeniser")
    for name in ("./tokeniser", "a/b/c", "../x", "~/nothing/here", "a/b.json", "a.model", "x.tiktoken", "a/"):
        with pytest.raises(UserError, match=r"no such tokenizer file or folder; check the path"):
            load_tokenizer(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no such file or folder here.*needs network.*HF_HUB_OFFLINE"):
        load_tokenizer("someone/some-tokenizer")
    assert hub.asked == 0


def test_no_network_is_found_out_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, ConnectionError("no route"))
    with pytest.raises(UserError, match=r"'s/t': no such file.*check the path.*network.*\(ConnectionError\)"):
        load_tokenizer("s/t")
    assert hub.asked == 1  # once, not again and again
    hub.answer = lambda: time.sleep(20)
    monkeypatch.setattr(tokenizer_hub, "HUB_WAIT_S", 0.2)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"no answer in 0\.2 s"):
        load_tokenizer("s/t")
    assert time.monotonic() - start < 5


def test_what_the_hub_refuses_is_said(bpe_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    response: Any = SimpleNamespace(status_code=404, headers={}, request=None)
    Hub(monkeypatch, RepositoryNotFoundError("no", response=response), bpe_folder)
    with pytest.raises(UserError, match=r"'s/t': no such file or folder here.*answered 404"):
        load_tokenizer("s/t")
