"""Joining the shards of a preprocessing run, by whichever task finishes last."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_lpa.data.storage.dataset_manifest import Manifest, manifest_path, read_manifest
from megatron_lpa.data.storage.indexed import IndexedDataset, idx_path
from megatron_lpa.data.storage.partial_file import PartialFile, WrittenElsewhere
from megatron_lpa.errors import UserError
from megatron_lpa.files import exists
from megatron_lpa.preparation.ledger import ledger_path
from megatron_lpa.preparation.merge import merge
from megatron_lpa.preparation.preprocess_config import PreprocessConfig, output_prefix


def merge_if_last(config: PreprocessConfig) -> dict[str, Manifest] | str:
    """Merges all shards of each key once the last of them is complete.

    Every task of an array calls it after its own shard; it does no harm to call it again.

    Args:
        config: of one of the shards.

    Returns:
        the manifests of the merged datasets by prefix; or, in words, why there was nothing to do.

    Raises:
        UserError: shards do not belong together, are damaged, or the disk is full.
    """
    assert config.shard is not None
    num_shards = config.shard[1]
    shards = [dataclasses.replace(config, shard=(number, num_shards)) for number in range(num_shards)]
    missing = [shard.prefix for shard in shards if not _complete(shard)]
    if missing:
        return f"shards still to be done: {len(missing)} of {num_shards}, the first is {missing[0]}"
    try:
        lock = PartialFile.open(Path(f"{config.output_prefix}.merge"))
    except WrittenElsewhere:
        return "another task is merging the shards"
    try:
        return {
            output_prefix(config.output_prefix, key): _merged(config, key, shards) for key in config.json_keys
        }
    finally:
        lock.discard()


def _merged(config: PreprocessConfig, key: str, shards: list[PreprocessConfig]) -> Manifest:
    prefix = output_prefix(config.output_prefix, key)
    parts = [output_prefix(shard.prefix, key) for shard in shards]
    manifests = [manifest for part in parts if (manifest := read_manifest(part)) is not None]
    _check_same_job(parts, manifests)
    tokens = sum(manifest.tokens for manifest in manifests)
    sources = [source for manifest in manifests for source in manifest.sources]
    overwrite = config.overwrite
    if exists(idx_path(prefix)):
        done = read_manifest(prefix)
        if done is not None and (done.tokens, done.sources) == (tokens, sources):
            return done
        # A merge that was killed before its manifest is ours to do again; anything else is not.
        overwrite = overwrite or (done is None and IndexedDataset(prefix).num_tokens == tokens)
    done = merge(parts, prefix, overwrite=overwrite, expect=len(shards))
    assert done is not None  # every part has a manifest
    return done


def _check_same_job(parts: list[str], manifests: list[Manifest]) -> None:
    """A file that came or went between two tasks would be in no shard, or in two."""
    for number, (part, manifest) in enumerate(zip(parts, manifests, strict=True)):
        if manifest.shard != [number, len(parts)] or manifest.job != manifests[0].job:
            raise UserError(
                f"{part}: made from another list of input files, or with other options, than {parts[0]}; "
                "when all files are there, repeat all shards with --overwrite"
            )


def _complete(shard: PreprocessConfig) -> bool:
    return not exists(ledger_path(shard.prefix)) and all(
        exists(manifest_path(output_prefix(shard.prefix, key))) for key in shard.json_keys
    )
