"""Remember texts once in a folder, and ask about them ever after."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from landmark.data import encoding
from landmark.data.chat import opening
from landmark.data.sources import Reading, Source, read_sources
from landmark.data.tokenizer import fingerprint
from landmark.hf.bundled import NAMES
from landmark.hf.cache import LandmarkCache
from landmark.hf.cache_io import Attachments
from landmark.memory.archive.layer import as_bytes
from landmark.memory.archive.log import STATE, Archive, require_free
from landmark.memory.archive.manifest import manifest_of, sources_of
from landmark.texts.chat import Chat
from landmark.texts.explain import explain_memory, uses_template
from landmark.texts.explanation import Explanation
from landmark.texts.files import file_sources
from landmark.texts.loading import LoadedModel, load, require_landmark

SAVE_TOKENS = 1 << 16  # read between two saves, at most
SAVE_SECONDS = 10.0  # likewise
TOKEN_BYTES = 4  # of a token id in its stream
SPAN_BYTES = 16  # of the two characters of a span in its stream


@dataclass(frozen=True)
class SavedProgress:
    """How much of a library is saved, told after every save.

    Attributes:
        tokens: remembered and on the disk.
        total: of all its texts.
        seconds: since reading began.
        read: tokens read in these seconds.
        nbytes: of the memory by tier, landmark keys counted on the device.
    """

    tokens: int
    total: int
    seconds: float
    read: int
    nbytes: dict[str, int]


class Library:
    """Texts that a model has read into a memory, to be asked about.

    It is made by ``remember`` or ``Library.open``.

    Attributes:
        loaded: the model and its tokenizer.
        memory: what the model remembers, of one row.
        reading: the texts that are to be remembered, and where each of their tokens stands.
        folder: where it is saved, as an absolute path.
        is_chat: whether the texts are read as the beginning of what a user says, by the tokenizer's
            chat template.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        memory: LandmarkCache,
        reading: Reading,
        folder: Path,
        *,
        is_chat: bool = False,
    ) -> None:
        self.loaded = loaded
        self.memory = memory
        self.reading = reading
        self.folder = folder.absolute()
        self.is_chat = is_chat

    @classmethod
    def open(
        cls,
        folder: str | Path,
        model: LoadedModel | str | None = None,
        tier: str = "disk",
        **budgets: Any,
    ) -> Library:
        """Opens a library without reading its blocks.

        Args:
            folder: where it was saved.
            model: the model that remembers it, or its name; ``None`` for the name that it was saved
                with.
            tier: where blocks live, as for ``LandmarkCache``.
            **budgets: likewise: ``device_bytes``, ``host_bytes``, ``spill_folder``, ``index``.

        Raises:
            FileNotFoundError: there is no memory in the folder.
            ValueError: a memory without texts, another model, or as ``LandmarkCache.open``.
        """
        folder = Path(folder)
        loaded = _loaded(model_of(folder) if model is None else model)
        memory = LandmarkCache.open(folder, loaded.model, tier, **budgets)
        assert memory.saved is not None
        notes = memory.saved.notes
        known = _sources_of(notes, folder)
        if notes["tokenizer"] != fingerprint(loaded.tokenizer):
            raise ValueError(
                f"{str(folder)!r} was remembered with another tokenizer than that of "
                f"{loaded.name}; use that"
            )
        ids = torch.frombuffer(memory.saved.attachment("tokens"), dtype=torch.int32).long()
        spans = torch.frombuffer(memory.saved.attachment("spans"), dtype=torch.int64).view(-1, 2)
        sources = _sources(known, memory.saved.attachment("characters"))
        is_chat = bool(notes.get("chat", False))
        return cls(loaded, memory, Reading(sources, ids, spans), folder, is_chat=is_chat)

    @property
    def tokens(self) -> int:
        """Text tokens remembered so far."""
        return sum(self.memory.tokens)

    def read(
        self,
        *,
        retrieve: bool = False,
        progress: Callable[[SavedProgress], None] | None = None,
        watch: encoding.Progress | None = None,
    ) -> None:
        """Reads what is not remembered yet, and saves it as it goes.

        It saves after 65,536 tokens or 10 seconds. Interrupted, it goes on from the last save.
        Chunks end at multiples of ``chunk_tokens``, so that the memory is the same, to the bit,
        wherever reading was interrupted.

        Args:
            retrieve: whether to read with retrieval, which is much slower. Questions do not need
                it.
            progress: called after every save.
            watch: called before every chunk with what is done, how much of it, and of how much.

        Raises:
            ValueError: no room on the disk, or another writer.
        """
        start = time.perf_counter()
        before = self.tokens
        saved = before
        saved_at = start
        total = len(self.reading.ids)
        while self.tokens < total:
            if watch is not None:
                watch("tokens read", self.tokens, total)
            self._read_chunk(retrieve=retrieve)
            due = (
                self.tokens - saved >= SAVE_TOKENS or time.perf_counter() - saved_at >= SAVE_SECONDS
            )
            if not due and self.tokens < total:
                continue
            self.save()
            saved = self.tokens
            saved_at = time.perf_counter()
            if progress is not None:
                nbytes = {tier: self.memory.nbytes(tier) for tier in ("device", "host", "disk")}
                progress(
                    SavedProgress(
                        tokens=saved,
                        total=total,
                        seconds=saved_at - start,
                        read=saved - before,
                        nbytes=nbytes,
                    )
                )

    def _read_chunk(self, *, retrieve: bool) -> None:
        """Reads to the next multiple of a chunk, or to the end."""
        model = self.loaded.model
        chunk = min(model.landmark.chunk_tokens, SAVE_TOKENS)
        part = self.reading.ids[self.tokens : (self.tokens // chunk + 1) * chunk]
        model.read(part[None].to(self.loaded.device), cache=self.memory, retrieve=retrieve)

    def save(self) -> None:
        """Saves what is remembered; raises as ``LandmarkCache.save``."""
        sources = [
            {"name": each.name, "characters": len(each.text)} for each in self.reading.sources
        ]
        notes = {
            "sources": sources,
            "model": self.loaded.folder or self.loaded.name,
            "tokenizer": fingerprint(self.loaded.tokenizer),
            "chat": self.is_chat,
        }
        attachments: Attachments = {
            "characters": self._characters,
            "tokens": self._tokens,
            "spans": self._spans,
        }
        self.memory.save(self.folder, notes=notes, attachments=attachments)

    def _tokens(self, kept: int) -> bytes:
        """Returns the token ids behind the ``kept`` bytes that are saved, as int32."""
        return _bytes(self.reading.ids[kept // TOKEN_BYTES :].int())

    def _spans(self, kept: int) -> bytes:
        """Returns the spans behind the ``kept`` bytes that are saved, as int64."""
        return _bytes(self.reading.spans[kept // SPAN_BYTES :])

    def _characters(self, kept: int) -> bytes:
        """Returns the texts of the sources that came since the last save, as UTF-8."""
        saved = self.memory.saved
        known = len(saved.notes["sources"]) if kept and saved is not None else 0
        return "".join(each.text for each in self.reading.sources[known:]).encode()

    def ask(self, question: str, *, max_new_tokens: int | None = None) -> Explanation:
        """Asks on a fork of the memory, which stays as it is.

        Args:
            question: a question about the texts; without a chat template what the model goes on
                from, as it stands, which ends where the answer begins.
            max_new_tokens: at most so many tokens are written, the most probable ones; by default
                16, 256 in a conversation.

        Returns:
            the answer, with the passages that were read for it.

        Raises:
            ValueError: nothing is remembered yet, an empty question, no new tokens, or a block that
                is not what was written.
        """
        return explain_memory(
            self.loaded.model,
            self.loaded.tokenizer,
            self.memory,
            self._remembered(),
            question,
            max_new_tokens=max_new_tokens,
            chat=self.is_chat,
        )

    def chat(self) -> Chat:
        """Begins a conversation about the texts, on a fork of the memory.

        Raises:
            ValueError: nothing is remembered yet, or not by a chat template.
        """
        if not self.is_chat:
            raise ValueError(
                f"chat: expected texts that were remembered by a chat template, got others in "
                f"{str(self.folder)!r}; remember them with a model that has one, or ask"
            )
        reading = self._remembered()
        return Chat(self.loaded, self.memory.fork(), reading)

    def _remembered(self) -> Reading:
        """Returns what was read so far; raises ``ValueError`` for nothing."""
        if self.tokens == 0:
            raise ValueError(
                f"expected a library that has read something in {str(self.folder)!r}, got none; "
                "read it first"
            )
        return Reading(
            self.reading.sources, self.reading.ids[: self.tokens], self.reading.spans[: self.tokens]
        )


def model_of(folder: str | Path) -> str | None:
    """Returns the model that remembers a library: its folder or name, ``None`` if it is bundled.

    Raises:
        FileNotFoundError, ValueError: as ``Library.open``.
    """
    notes = manifest_of(Archive.open(folder))["notes"]
    _sources_of(notes, folder)
    model: str = notes["model"]
    if model == NAMES[0]:
        return None
    if os.path.isabs(model) and not os.path.isdir(model):
        raise FileNotFoundError(
            f"model: expected the one that made the memory {str(folder)!r} in {model}, got "
            "nothing there; pass its new folder: model=FOLDER"
        )
    return model


def remember(
    files: Sequence[str | Path],
    folder: str | Path,
    model: LoadedModel | str | None = None,
    *,
    tier: str = "disk",
    retrieve: bool = False,
    chat: bool | None = None,
    progress: Callable[[SavedProgress], None] | None = None,
    watch: encoding.Progress | None = None,
    **budgets: Any,
) -> Library:
    """Remembers texts in a folder, or goes on with what is there.

    Where the tokenizer has a chat template, the texts are the beginning of what a user says, and
    questions about them end it.

    Args:
        files: text files, or folders of .txt files, read one after the other. Where the folder
            holds a library, they begin with its texts.
        folder: where it is saved.
        model: a landmark model with its tokenizer, or its name; ``None`` for the bundled one.
        tier: where blocks live meanwhile, as for ``LandmarkCache``.
        retrieve: as for ``Library.read``.
        chat: whether to use the chat template; ``None`` for yes where there is one, or for what the
            library in the folder did.
        progress: as for ``Library.read``.
        watch: likewise, and while the texts are tokenised.
        **budgets: likewise: ``device_bytes``, ``host_bytes``, ``spill_folder``, ``index``.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: no text, a plain model, other texts than those of the library in the folder, or
            as ``Library.open``.
    """
    folder = Path(folder)
    sources = file_sources(map(Path, files), watch)
    if (folder / STATE).exists():
        library = Library.open(folder, model, tier, **budgets)
        if chat is not None and chat != library.is_chat:
            raise ValueError(
                f"chat: expected {library.is_chat}, as {str(folder)!r} was remembered, got {chat}; "
                "leave it out, or name another folder"
            )
        library.reading = _continued(library, sources, watch)
    else:
        require_free(folder)
        loaded = _loaded(model)
        is_chat = uses_template(loaded.tokenizer, chat)
        begin = opening(loaded.tokenizer) if is_chat else None
        reading = read_sources(sources, loaded.tokenizer, watch, opening=begin)
        memory = LandmarkCache(loaded.model, tier, **budgets)
        library = Library(loaded, memory, reading, folder, is_chat=is_chat)
    library.read(retrieve=retrieve, progress=progress, watch=watch)
    return library


def _continued(
    library: Library, sources: Sequence[Source], watch: encoding.Progress | None
) -> Reading:
    """Returns the reading of more sources than those of the library, which come first.

    Raises:
        ValueError: the texts, or their tokens, begin otherwise than those of the library.
    """
    known = library.reading.sources
    if tuple(each.text for each in sources[: len(known)]) != tuple(each.text for each in known):
        names = ", ".join(each.name for each in known[:3])
        if len(known) > 3:
            names += ", ..."
        raise ValueError(
            f"files: expected those of the library in {str(library.folder)!r} first ({names}), "
            f"unchanged, then further ones, got {', '.join(each.name for each in sources[:3])}; "
            "name them, or another folder"
        )
    tokenizer = library.loaded.tokenizer
    begin = opening(tokenizer) if library.is_chat else None
    reading = read_sources(sources, tokenizer, watch, opening=begin)
    if not torch.equal(reading.ids[: library.tokens], library.reading.ids[: library.tokens]):
        raise ValueError(
            f"folder: expected a memory of the tokens of these texts in {str(library.folder)!r}, "
            "got one that was tokenised otherwise, by an earlier version; remember them in "
            "another folder"
        )
    return reading


def _loaded(model: LoadedModel | str | None) -> LoadedModel:
    """Returns a landmark model, loaded if it is given by its name; raises ``ValueError``."""
    loaded = model if isinstance(model, LoadedModel) else load(model)
    require_landmark(loaded)
    return loaded


def _bytes(tensor: Tensor) -> bytes:
    return bytes(as_bytes(tensor.contiguous()))


def _sources_of(notes: dict[str, Any], folder: str | Path) -> list[tuple[str, int]]:
    """Returns the names of a library's texts and how many characters they have.

    Raises:
        ValueError: a memory without its texts.
    """
    sources = sources_of(notes)
    if sources is None or not all(
        isinstance(notes.get(name), str) for name in ("model", "tokenizer")
    ):
        raise ValueError(
            f"expected a memory with its texts in {str(folder)!r}, got one without; use landmark "
            "remember"
        )
    return sources


def _sources(known: Sequence[tuple[str, int]], characters: bytearray) -> tuple[Source, ...]:
    """Returns texts that were saved one after the other, by name and number of characters."""
    text = characters.decode()
    ends = itertools.accumulate(count for _, count in known)
    return tuple(
        Source(name, text[end - count : end])
        for (name, count), end in zip(known, ends, strict=True)
    )
