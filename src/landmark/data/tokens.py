"""Token files: texts tokenised once into one sequence of ids, memory-mapped from then on.

``NAME.bin`` holds the ids (little-endian uint16 or uint32). ``NAME.json`` beside it describes them:
the hash of the tokenizer, title, hash and position of each document, and the hash of the ids. Both
can be moved together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from landmark.data import outputs
from landmark.data.encoding import Progress, TextEncoder
from landmark.data.errors import names
from landmark.data.text import Document, read_json
from landmark.data.tokenizer import backend, fingerprint

FORMAT = "landmark-tokens-1"
BATCH = 32  # documents encoded at once
WHOLE = 1 << 20  # characters; a longer document is encoded alone, in pieces

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclasses.dataclass(frozen=True)
class DocumentSpan:
    """The position of a document in a token file.

    Attributes:
        title: the title of the document.
        sha256: its hash.
        start: index of its first id.
        tokens: how many ids it has, the separator behind it not counted.
    """

    title: str
    sha256: str
    start: int
    tokens: int


@dataclasses.dataclass
class TokenFile:
    """A sequence of token ids and the documents that it was made from.

    Attributes:
        path: the ``.bin`` file.
        ids: the ids, shape ``(tokens,)``, memory-mapped, read only.
        documents: the position of each document.
        tokenizer: fingerprint of the tokenizer.
    """

    path: Path
    ids: Ids
    documents: list[DocumentSpan]
    tokenizer: str

    def __len__(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ids": self.ids.dtype.str}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.ids = np.memmap(self.path, dtype=state["ids"], mode="r")


def tokenize(
    documents: Callable[[], Iterable[Document]],
    tokenizer: PreTrainedTokenizerFast,
    folder: str | Path,
    name: str,
    progress: Progress | None = None,
) -> TokenFile:
    """Returns the token file of documents: one that is there and fits, otherwise a new one.

    A file fits when tokenizer and documents (by SHA-256, in order) are the same. Documents are
    separated by eos.

    Args:
        documents: yields the documents from the first on, each time it is called. They are never
            held all at once.
        tokenizer: a fast tokenizer.
        folder: the folder of ``name.bin`` and ``name.json``.
        name: usually the split.
        progress: called after some documents, and while a long one is tokenised.

    Raises:
        ValueError: a file of that name that is no token file, or a damaged one; or no document.
    """
    sidecar = Path(folder) / f"{name}.json"
    if sidecar.exists() or sidecar.with_suffix(".bin").exists():
        old = open_tokens(sidecar)
        if old.tokenizer == fingerprint(tokenizer):
            hashes = [document.sha256 for document in documents()]
            if hashes == [span.sha256 for span in old.documents]:
                return old
    return _write(documents(), tokenizer, sidecar, progress)


def open_tokens(sidecar: str | Path) -> TokenFile:
    """Opens a token file by its ``.json`` and checks it.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the files have another format, or the ids are not those that were written.
    """
    sidecar = Path(sidecar)
    binary = sidecar.with_suffix(".bin")
    for file in (sidecar, binary):
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: missing; a token file is a .json and a .bin: delete the other and "
                "tokenise anew"
            )
    try:
        header = read_json(sidecar)
        if header["format"] != FORMAT:
            raise KeyError
        documents = [DocumentSpan(**span) for span in header["documents"]]
        tokens = int(header["tokens"])
        dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[header["dtype"]])
        digest = str(header["sha256"])
        tokenizer = str(header["tokenizer"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{sidecar}: expected the header of a {FORMAT} file, got something else; name another "
            "folder"
        ) from None
    if binary.stat().st_size != tokens * dtype.itemsize:
        raise ValueError(
            f"{binary}: expected {tokens * dtype.itemsize} bytes, got {binary.stat().st_size}; "
            f"the file is damaged: delete it with {sidecar.name} and tokenise anew"
        )
    ids = np.memmap(binary, dtype=dtype, mode="r")
    if _digest(ids) != digest:
        raise ValueError(
            f"{binary}: its ids are not those that were written; delete it with {sidecar.name} "
            "and tokenise anew"
        )
    return TokenFile(binary, ids, documents, tokenizer)


def _write(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    sidecar: Path,
    progress: Progress | None,
) -> TokenFile:
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    unfinished = sidecar.with_suffix(".unfinished")
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    spans: list[DocumentSpan] = []
    position = 0
    digest = hashlib.sha256()
    try:
        with names(unfinished), unfinished.open("wb") as binary:
            for document, ids in _encode(iter(documents), tokenizer, progress):
                spans.append(
                    DocumentSpan(
                        title=document.title,
                        sha256=document.sha256,
                        start=position,
                        tokens=len(ids),
                    )
                )
                raw = np.asarray(ids + end, dtype="<u2" if dtype == "uint16" else "<u4").tobytes()
                binary.write(raw)
                digest.update(raw)
                position += len(ids) + len(end)
                if progress is not None:
                    progress(f"tokens, of {len(spans):,} documents", position, 0)
        if not spans:
            raise ValueError(
                f"{sidecar.stem}: expected at least one document, got none; pass a source with text"
            )
        header = {
            "format": FORMAT,
            "dtype": dtype,
            "tokens": position,
            "sha256": digest.hexdigest(),
            "tokenizer": fingerprint(tokenizer),
            "documents": [dataclasses.asdict(span) for span in spans],
        }
        outputs.write(sidecar, json.dumps(header, indent=1, ensure_ascii=False).encode())
        unfinished.replace(sidecar.with_suffix(".bin"))
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return open_tokens(sidecar)


def _encode(
    documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast, progress: Progress | None
) -> Iterator[tuple[Document, list[int]]]:
    """Yields documents with their ids; short documents are encoded several at once."""
    encoder = TextEncoder(backend(tokenizer))
    while batch := list(itertools.islice(documents, BATCH)):
        short = [document.text for document in batch if len(document.text) <= WHOLE]
        encoded = iter(encoder.core.encode_batch_fast(short, add_special_tokens=False))
        for document in batch:
            if len(document.text) <= WHOLE:
                yield document, next(encoded).ids
            else:
                yield document, encoder.encode(document.text, progress=progress).ids.tolist()


def _digest(ids: Ids) -> str:
    return hashlib.sha256(ids.view(np.uint8).data).hexdigest()
