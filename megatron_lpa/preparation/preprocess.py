"""Raw text to token files: read in one process, parse and tokenize in several, write in one.

A run keeps a ledger (``ledger.py``) and, killed at any moment, goes on where it was; the files it ends with
are the same as without the kill.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple
from importlib.metadata import version
from typing import Any

import megatron_lpa
from megatron_lpa.data.storage.dataset_manifest import (
    Checksums,
    Manifest,
    SourceRecord,
    SubsetCount,
    TokenizerRecord,
    manifest_path,
    read_manifest,
    write_manifest,
)
from megatron_lpa.data.storage.indexed import best_dtype, bin_path, idx_path
from megatron_lpa.data.tokenizers.fast import WrongIdsError
from megatron_lpa.data.tokenizers.opening import Tokenizer, load_tokenizer
from megatron_lpa.errors import UserError
from megatron_lpa.files import exists
from megatron_lpa.preparation.documents import PILE_SUBSET
from megatron_lpa.preparation.encode import EncodedChunk, Position, Task, encode_task, initialize_worker
from megatron_lpa.preparation.hub_datasets import dataset_source
from megatron_lpa.preparation.ledger import FinishedSource, Ledger, State, ledger_path
from megatron_lpa.preparation.ordered_pool import ordered_map
from megatron_lpa.preparation.outputs import Outputs
from megatron_lpa.preparation.preprocess_config import (
    PreprocessConfig,
    check_options,
    output_prefix,
    reject_path,
)
from megatron_lpa.preparation.progress_lines import ProgressLines
from megatron_lpa.preparation.readers import CHUNK_BYTES, Chunk, SourceReader
from megatron_lpa.preparation.sources import Source, file_sources, shard_of

logger = logging.getLogger(__name__)

_MAX_SUBSETS = 10_000
_TASK_CHUNKS = 64  # at most, where files are small


def preprocess(config: PreprocessConfig) -> dict[str, Manifest]:
    """Tokenizes and writes every output, each whole or not at all.

    Documents without tokens are left out and counted. A manifest per output is written last. Whatever ends
    the run early, the next call with the same ``config`` goes on where it was.

    A shard that is complete already is left alone, so that the tasks of an array can be repeated.

    Returns:
        the manifest of each output by its prefix.

    Raises:
        UserError: bad input, tokenizer or options, existing output, a full disk, or a dead worker.
    """
    check_options(config)
    all_sources = _sources(config)
    sources = all_sources if config.shard is None else shard_of(all_sources, *config.shard)
    tokenizer = load_tokenizer(config.tokenizer, config.engine)
    if tokenizer.fallback_reason:
        logger.info(f"note: the fast tokenizer is not used: {tokenizer.fallback_reason}")
    if config.append_eod and tokenizer.eod_id is None:
        raise UserError(
            f"tokenizer {config.tokenizer!r} has no end-of-document token, so --append-eod cannot work; "
            "name one as eos_token in its tokenizer_config.json, or leave --append-eod out"
        )
    prefixes = [output_prefix(config.prefix, key) for key in config.json_keys]
    job = _job(config, tokenizer, all_sources)
    if config.shard is not None and not config.restart:
        complete = _complete_shard(config, prefixes, job)
        if complete is not None:
            return complete
    ledger = Ledger(config.prefix, {**job, "shard": config.shard}, len(prefixes), config.restart)
    with contextlib.closing(ledger):
        if not ledger.state.all_read:
            try:
                _check_outputs(prefixes, config.overwrite)
            except UserError:
                if not ledger.resumed:
                    ledger.remove()
                raise
        if ledger.resumed:
            _introduce_resume(ledger.state, sources)
        run = _Run(config, sources, ledger, tokenizer)
        with Outputs(
            prefixes, reject_path(config.prefix), best_dtype(tokenizer.vocab_size), run.state
        ) as out:
            try:
                if not run.state.all_read:
                    run.read_all(out)
                _check_found_something(config, run.state)
                checksums = out.publish()
            except BaseException as error:
                run.keep_or_discard(out, error)
                raise
        manifests = {}
        for number, prefix in enumerate(prefixes):
            manifests[prefix] = _manifest(config, run.state, number, tokenizer, checksums[prefix], job)
            write_manifest(prefix, manifests[prefix])
        ledger.remove()
    return manifests


class _Run:
    """Reading from where the ledger's state is to the end."""

    def __init__(
        self, config: PreprocessConfig, sources: list[Source], ledger: Ledger, tokenizer: Tokenizer
    ) -> None:
        self._tokenizer = tokenizer
        self._config, self._sources, self._ledger = config, sources, ledger
        self.state = ledger.state  # always after a whole task
        self._documents_by_source: dict[int, list[int]] = {}
        if self.state.source_documents:
            self._documents_by_source[self.state.position.source] = self.state.source_documents
        self._on_disk = self.state

    def read_all(self, out: Outputs) -> None:
        config, progress = self._config, ProgressLines(self._config.log_interval, self.state)
        results = ordered_map(
            encode_task,
            _tasks(self._sources, config.selection.columns, self.state.position),
            config.workers,
            initialize_worker,
            (
                config.tokenizer,
                self._tokenizer.fingerprint,
                "auto" if self._tokenizer.engine == "gigatoken" else "reference",
                config.selection,
                config.append_eod,
            ),
            lambda task: sum(len(chunk.data) for chunk in task.chunks),
        )
        next_commit = time.monotonic() + config.commit_interval_s
        with contextlib.closing(results):
            for task, encoded in results:
                self.state = self._after(task, encoded, out)
                progress.show(self.state)
                if time.monotonic() >= next_commit:
                    self._commit(out)
                    next_commit = time.monotonic() + config.commit_interval_s
        self.state.all_read = True
        self._commit(out)
        if config.log_interval:
            progress.report(self.state)

    def keep_or_discard(self, out: Outputs, error: BaseException) -> None:
        """Before an exception ends the run: keep what was done, or leave nothing if nothing was."""
        if isinstance(error, WrongIdsError):  # nobody knows since when
            out.discard()
            self._ledger.remove()
            return
        if self.state is not self._on_disk:
            with contextlib.suppress(UserError):  # a full disk: what the ledger has is still good
                self._commit(out)
        nothing_found = self.state.all_read and not all(counts.documents for counts in self.state.counts)
        if nothing_found:
            out.publish_rejected()  # they say why
        if nothing_found or self._on_disk.position == Position():
            out.discard()
            self._ledger.remove()

    def _commit(self, out: Outputs) -> None:
        out.sync()
        self._ledger.commit(self.state)
        self._on_disk = self.state

    def _after(self, task: Task, encoded: list[EncodedChunk], out: Outputs) -> State:
        """Writes what a task gave and returns the state after it; the state before it stays as it is."""
        before = self.state
        state = before.copy()
        for source, chunk in zip(task.chunk_sources, encoded, strict=True):
            if chunk.rejected and self._config.on_bad_line == "error":
                raise UserError(
                    f"{chunk.rejected[0].message} (or pass --on-bad-line skip, which goes on from here, "
                    "leaves out such records and lists them in a file; a changed input file starts anew)"
                )
            out.add(chunk.outputs, chunk.rejected)
            for counts, output in zip(state.counts, chunk.outputs, strict=True):
                counts.add(output.counts)
                if len(counts.subsets) + len(state.dropped) > _MAX_SUBSETS:
                    raise UserError(
                        f"more than {_MAX_SUBSETS} different names of subsets under "
                        f"{self._config.subset_key!r}; choose another --subset-key"
                    )
            for name, count in chunk.dropped.items():
                state.dropped[name] = state.dropped.get(name, 0) + count
            state.rejected += len(chunk.rejected)
            documents = self._documents_by_source.get(source, [0] * len(chunk.outputs))
            self._documents_by_source[source] = [
                count + output.counts.documents
                for count, output in zip(documents, chunk.outputs, strict=True)
            ]
        for index, sha256 in task.finished:
            source_ = self._sources[index]
            documents = self._documents_by_source.pop(index, [0] * len(state.counts))
            state.finished.append(
                FinishedSource(
                    source_.name,
                    source_.size_bytes,
                    sha256,
                    documents,
                    source_.config,
                    source_.split,
                    source_.revision,
                )
            )
        state.position = task.position
        state.source_documents = self._documents_by_source.get(task.position.source, [])
        state.writers = out.positions
        state.rejected_bytes = out.rejected_bytes
        return state


def _tasks(sources: Sequence[Source], columns: tuple[str, ...], start: Position) -> Iterator[Task]:
    chunks: list[Chunk] = []
    owners: list[int] = []
    finished: list[tuple[int, str | None]] = []
    size_bytes = 0
    for index in range(start.source, len(sources)):
        reader = SourceReader(sources[index], columns, start.records if index == start.source else 0)
        for chunk in reader:
            chunks.append(chunk)
            owners.append(index)
            size_bytes += len(chunk.data)
            if size_bytes >= CHUNK_BYTES or len(chunks) >= _TASK_CHUNKS:
                position = Position(index, chunk.first + chunk.count - 1)
                yield Task(tuple(chunks), tuple(owners), position, tuple(finished))
                chunks, owners, finished, size_bytes = [], [], [], 0
        finished.append((index, reader.sha256))
    yield Task(tuple(chunks), tuple(owners), Position(len(sources), 0), tuple(finished))


def _sources(config: PreprocessConfig) -> list[Source]:
    if bool(config.inputs) == bool(config.dataset):
        raise UserError("give the text once: --input, or --dataset")
    if config.dataset:
        return [dataset_source(config.dataset, config.dataset_config, config.dataset_split)]
    return file_sources(config.inputs)


def _job(config: PreprocessConfig, tokenizer: Tokenizer, sources: list[Source]) -> dict[str, Any]:
    """Everything that decides the output of all shards, to recognise unfinished work of the same call."""
    libraries = ("tokenizers", "sentencepiece", "tiktoken")
    return {
        "version": [megatron_lpa.__version__, *(f"{name} {version(name)}" for name in libraries)],
        "tokenizer": tokenizer.fingerprint,
        "end-of-document_id": tokenizer.eod_id if config.append_eod else None,
        "json_keys": config.json_keys,
        "subset_key": config.subset_key,
        "kept_subsets": sorted(config.keep_subsets),
        "dropped_subsets": sorted(config.drop_subsets),
        "inputs": [list(astuple(source)) for source in sources],
    }


def _digest(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job).encode()).hexdigest()


def _complete_shard(
    config: PreprocessConfig, prefixes: list[str], job: dict[str, Any]
) -> dict[str, Manifest] | None:
    """The manifests of a shard that an earlier call completed; ``None`` where there is something to do."""
    if exists(ledger_path(config.prefix)):
        return None
    manifests = {}
    for prefix in prefixes:
        manifest = read_manifest(prefix)
        if manifest is None or not (exists(bin_path(prefix)) and exists(idx_path(prefix))):
            return None
        if manifest.job != _digest(job):
            return None  # and the usual refusal to overwrite follows
        manifests[prefix] = manifest
    return manifests


def _introduce_resume(state: State, sources: list[Source]) -> None:
    at = (
        "everything was read"
        if state.all_read or state.position.source == len(sources)
        else f"at record {state.position.records + 1} of {sources[state.position.source].name}"
    )
    logger.info(f"going on after {state.counts[0].documents} documents of an unfinished run ({at})")


def _check_found_something(config: PreprocessConfig, state: State) -> None:
    for key, counts in zip(config.json_keys, state.counts, strict=True):
        if counts.documents == 0:
            raise UserError(
                f"{config.dataset or ', '.join(config.inputs)}: no document has tokens under {key!r} "
                f"({counts.empty_documents} are empty, {sum(state.dropped.values())} dropped because of "
                f"their subset, {state.rejected} bad); check the input"
                + (
                    f" and the names of subsets: {', '.join(sorted(state.dropped)[:30])}"
                    if state.dropped
                    else ""
                )
            )


def missing_subsets(config: PreprocessConfig, manifests: dict[str, Manifest]) -> list[str]:
    """Subsets that were to be kept or dropped, but that no record was of; a warning is printed for each."""
    seen = {
        name for manifest in manifests.values() for name in (*manifest.subsets, *manifest.dropped_subsets)
    }
    if not seen and config.subset_key != PILE_SUBSET:
        logger.warning(
            f"no record names its subset under {config.subset_key!r} (--subset-key); is it spelled so?"
        )
    missing = [name for name in (*config.keep_subsets, *config.drop_subsets) if name not in seen]
    for name in missing:
        logger.warning(f"no record was of subset {name!r}; is it spelled so?")
    return missing


def _check_outputs(prefixes: list[str], overwrite: bool) -> None:
    for prefix in prefixes:
        for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
            if exists(path) and not overwrite:
                raise UserError(f"{path}: exists; choose another --output-prefix or pass --overwrite")


def _manifest(
    config: PreprocessConfig,
    state: State,
    number: int,
    tokenizer: Tokenizer,
    checksums: Checksums,
    job: dict[str, Any],
) -> Manifest:
    counts = state.counts[number]
    return Manifest(
        documents=counts.documents,
        tokens=counts.tokens,
        empty_documents=counts.empty_documents,
        dropped_documents=sum(state.dropped.values()),
        dropped_subsets=dict(sorted(state.dropped.items())),
        rejected_documents=state.rejected,
        bytes_text=counts.bytes_text,
        words=counts.words,
        dtype=best_dtype(tokenizer.vocab_size).name,
        json_key=config.json_keys[number],
        append_eod=config.append_eod,
        tokenizer=TokenizerRecord(
            tokenizer.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id
        ),
        checksums=checksums,
        sources=[
            SourceRecord(**{**asdict(source), "documents": source.documents[number]})
            for source in state.finished
        ],
        subsets={name: SubsetCount(*count) for name, count in sorted(counts.subsets.items())},
        keep_subsets=sorted(config.keep_subsets),
        drop_subsets=sorted(config.drop_subsets),
        job=None if config.shard is None else _digest(job),
        shard=None if config.shard is None else list(config.shard),
        version=megatron_lpa.__version__,
    )
