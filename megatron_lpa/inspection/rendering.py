"""A dataset's summary as text, as JSON, and as a picture."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from megatron_lpa.inspection.statistics import LengthStatistics, Part, Summary

_BAR_COLUMNS = 40
_NAME_COLUMNS = 60


def summary_text(summary: Summary) -> str:
    """Several lines for a person."""
    blocks = [_counts(summary), _lengths(summary.lengths, summary.documents)]
    if summary.subsets:
        blocks.append(_parts("subset", summary.subsets, summary))
    if summary.sources:
        blocks.append(_parts("source file", summary.sources, summary))
    return "\n\n".join(blocks)


def _counts(summary: Summary) -> str:
    rows = [
        ("documents", f"{summary.documents:,}"),
        ("sequences", f"{summary.sequences:,}"),
        ("tokens", f"{summary.tokens:,} ({summary.dtype})"),
        (".bin", f"{summary.bin_bytes:,} bytes"),
        (".idx", f"{summary.idx_bytes:,} bytes"),
    ]
    manifest = summary.manifest
    if manifest is None:
        rows.append(("manifest", "none"))
    else:
        tokenizer = manifest.tokenizer
        rows += [
            ("tokenizer", tokenizer.name),
            ("fingerprint", tokenizer.fingerprint),
            ("vocabulary", f"{tokenizer.vocab_size:,} ids, end of document {tokenizer.eod_id}"),
            ("ends appended", "yes" if manifest.append_eod else "no"),
            ("JSON key", manifest.json_key),
            ("text", f"{manifest.bytes_text:,} bytes, {manifest.words:,} words"),
            ("bytes per token", f"{manifest.bytes_text / summary.tokens:.3f}"),
            ("tokens per word", f"{summary.tokens / manifest.words:.3f}" if manifest.words else "-"),
            (
                "left out",
                f"{manifest.empty_documents:,} empty, {manifest.dropped_documents:,} dropped, "
                f"{manifest.rejected_documents:,} rejected documents",
            ),
            ("made by", f"megatron_lpa {manifest.version}"),
        ]
    return "\n".join([summary.prefix, *(f"  {name:<16}{value}" for name, value in rows)])


def _lengths(lengths: LengthStatistics, documents: int) -> str:
    lines = [
        "tokens per document",
        f"  min {lengths.minimum:,}, median {lengths.median:,g}, mean {lengths.mean:,.1f}, "
        f"p99 {lengths.p99:,.6g}, max {lengths.maximum:,}",
    ]
    most = max(bucket.documents for bucket in lengths.buckets)
    names = [
        f"{bucket.low:,}" if bucket.low == bucket.high else f"{bucket.low:,} to {bucket.high:,}"
        for bucket in lengths.buckets
    ]
    width = max(len(name) for name in names)
    tokens = max(sum(bucket.tokens for bucket in lengths.buckets), 1)
    lines.append(f"  {'':>{width}}  {'documents':>14}  {'share':>6}  {'of tokens':>9}")
    for name, bucket in zip(names, lengths.buckets, strict=True):
        # Rounded up, so that what is there is seen.
        bar = "#" * -(-bucket.documents * _BAR_COLUMNS // most)
        lines.append(
            f"  {name:>{width}}  {bucket.documents:>14,}  {bucket.documents / documents:>6.1%}  "
            f"{bucket.tokens / tokens:>9.1%}  {bar}".rstrip()
        )
    return "\n".join(lines)


def _parts(title: str, parts: list[Part], summary: Summary) -> str:
    names = [_shortened(part.name) for part in parts]
    width = max(len(title), *(len(name) for name in names))
    lines = [f"{title:<{width + 2}}  {'documents':>14}  {'tokens':>16}  {'of tokens':>9}"]
    for name, part in zip(names, parts, strict=True):
        tokens, share = (
            ("-", "-") if part.tokens is None else (f"{part.tokens:,}", f"{part.tokens / summary.tokens:.2%}")
        )
        lines.append(f"  {name:<{width}}  {part.documents:>14,}  {tokens:>16}  {share:>9}")
    return "\n".join(lines)


def _shortened(name: str) -> str:
    return name if len(name) <= _NAME_COLUMNS else f"...{name[3 - _NAME_COLUMNS :]}"


def summary_json(summary: Summary) -> dict[str, Any]:
    """For programs: everything in the summary, with the manifest but not its checksums and sources."""
    content = asdict(summary)
    if content["manifest"] is not None:
        for name in ("checksums", "sources", "subsets"):  # long, or in the summary already
            del content["manifest"][name]
        content["bytes_per_token"] = content["manifest"]["bytes_text"] / summary.tokens
    return content


def length_figure(summary: Summary) -> Any:
    """A matplotlib figure: shares of documents and of tokens by the length of the document."""
    # Figure without pyplot draws with Agg: no display is needed, and no state is left behind.
    from matplotlib.figure import Figure

    buckets = summary.lengths.buckets
    figure = Figure(figsize=(max(6.0, 0.45 * len(buckets) + 2), 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    places = range(len(buckets))
    for offset, name, counts, total, colour in (
        (-0.2, "documents", [bucket.documents for bucket in buckets], summary.documents, "#0072B2"),
        (0.2, "tokens", [bucket.tokens for bucket in buckets], summary.tokens, "#D55E00"),
    ):
        shares = [100 * count / total for count in counts]
        axes.bar([place + offset for place in places], shares, width=0.4, color=colour, label=f"of {name}")
    axes.set_xticks(list(places), [f"{bucket.low:,}" for bucket in buckets], rotation=45, ha="right")
    axes.set_xlabel("Tokens per document, from")
    axes.set_ylabel("Share (%)")
    axes.grid(True, axis="y", color="#d9d9d9", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle(
        f"{summary.documents:,} documents, {summary.tokens:,} tokens, median {summary.lengths.median:,g}",
        fontsize=12,
    )
    return figure
