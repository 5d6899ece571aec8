"""Texts of any length to token ids: as the tokenizer would give them for the whole text, and
nothing around them.

No special token is added here; what a row begins with is ``row_start``. A text that goes on from
another one gets no prefix either, such as the space that many tokenizers put before a text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer, models

PIECE = 1 << 16  # characters that are encoded at once
OVERLAP = 1 << 10  # further ones, which the next piece has as well
PIECES = os.cpu_count() or 1  # encoded in parallel between two reports

Progress = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is done, and how much there is (0: not known)."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of a text.

    Attributes:
        ids: ``(n,)`` int64.
        spans: ``(n, 2)`` int64, first character of each token and the one after its last.
        begins: ``(n,)`` bool, whether a word of the tokenizer begins with this token.
    """

    ids: npt.NDArray[np.int64]
    spans: npt.NDArray[np.int64]
    begins: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> Encoded:
        return Encoded(self.ids[part], self.spans[part], self.begins[part])


class TextEncoder:
    """Encodes texts with a tokenizer of the package ``tokenizers``; it neither truncates nor pads
    from then on.
    """

    def __init__(self, core: Tokenizer) -> None:
        core.no_truncation()
        core.no_padding()
        self.core = core
        self._bare = _without_prefix(core)
        self._added = {
            number: token.content for number, token in core.get_added_tokens_decoder().items()
        }

    @property
    def prefixes(self) -> bool:
        """Whether the tokenizer may put something before a text."""
        return self._bare is not None

    def encode(
        self, text: str, *, continues: bool = False, progress: Progress | None = None
    ) -> Encoded:
        """Returns the tokens of a text, none of them special but those that are written in it.

        A long text is encoded in pieces that overlap. Two of them are joined where they agree;
        where they do not, longer pieces are tried, in the end the whole text.

        Args:
            text: its characters.
            continues: it goes on from a text before it: what the tokenizer puts before a text is
                left out.
            progress: called after some pieces.
        """
        piece = PIECE
        overlap = OVERLAP
        while (found := self._in_pieces(text, piece, overlap, continues, progress)) is None:
            piece = 2 * piece
            overlap = 2 * overlap
        return found

    def _in_pieces(
        self, text: str, piece: int, overlap: int, continues: bool, progress: Progress | None
    ) -> Encoded | None:
        """The tokens, or ``None`` where two pieces do not agree on what both hold."""
        starts = range(0, max(1, len(text) - overlap), piece)
        done: list[Encoded] = []
        for first in range(0, len(starts), PIECES):
            some = starts[first : first + PIECES]
            texts = [text[start : start + piece + overlap] for start in some]
            for start, characters, encoding in zip(some, texts, self._batch(texts), strict=True):
                found = _encoded(encoding, start)
                if start == 0:
                    done.append(self._continued(characters, encoding) if continues else found)
                    continue
                seam = self._seam(done[-1], found, start + overlap - overlap // 4, overlap // 4)
                if seam is None:
                    return None
                done[-1:] = [done[-1][: seam[0]], found[seam[1] :]]
            if progress is not None:
                progress(
                    "characters tokenised", min(len(text), some[-1] + piece + overlap), len(text)
                )
        return _joined(done)

    def _batch(self, texts: list[str]) -> list[Encoding]:
        found: list[Encoding] = self.core.encode_batch(texts, add_special_tokens=False)
        return found

    def _seam(
        self, before: Encoded, after: Encoded, limit: int, run: int
    ) -> tuple[int, int] | None:
        """Where two overlapping pieces may be joined.

        Returns:
            how many tokens of each end by the character ``limit``; ``None`` unless the last of them
            are the same in both for at least ``run`` characters, a border of words among them:
            words do not depend on each other. In one word, byte pairs are merged the same way
            wherever the same tokens stand side by side; other models weigh the whole word.
        """
        left, right = (
            int(np.searchsorted(np.maximum.accumulate(each.spans[:, 1]), limit, side="right"))
            for each in (before, after)
        )
        bordered = isinstance(self.core.model, models.BPE)
        for back in range(1, min(left, right) + 1):
            ours = left - back
            theirs = right - back
            if (
                before.ids[ours] != after.ids[theirs]
                or (before.spans[ours] != after.spans[theirs]).any()
            ):
                return None
            bordered |= bool(before.begins[ours] and after.begins[theirs])
            if bordered and before.spans[ours, 0] <= limit - run:
                return left, right
        return None

    def _continued(self, text: str, encoding: Encoding) -> Encoded:
        """Leaves the prefix out: up to a border of words that both have, the tokens are those found
        without it.
        """
        whole = _encoded(encoding)
        if self._bare is None:
            return whole
        special = next(
            (
                index
                for index in range(len(whole))
                if self._is_written(text, whole[index : index + 1])
            ),
            None,
        )
        special, end = (
            (len(whole), len(text)) if special is None else (special, int(whole.spans[special, 0]))
        )
        bare = _encoded(self._bare.encode(text[:end], add_special_tokens=False))
        ours = {**_borders(bare), end: len(bare)}
        theirs = {**_borders(whole), end: special}
        border = min(place for place in theirs if place in ours and (place > 0 or place == end))
        return _joined([bare[: ours[border]], whole[theirs[border] :]])

    def _is_written(self, text: str, token: Encoded) -> bool:
        """Whether one token stands in the text by its name; no unknown word does."""
        name = self._added.get(int(token.ids[0]))
        (begin, end) = token.spans[0]
        return name is not None and name in text[begin:end]


def _encoded(encoding: Encoding, start: int = 0) -> Encoded:
    """The tokens of a text whose first character is ``start``."""
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start
    words = np.array(encoding.word_ids, dtype=np.int64)
    return Encoded(np.array(encoding.ids, dtype=np.int64), spans, np.diff(words, prepend=-1) != 0)


def _joined(parts: list[Encoded]) -> Encoded:
    return Encoded(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.spans for part in parts]),
        np.concatenate([part.begins for part in parts]),
    )


def _borders(text: Encoded) -> dict[int, int]:
    """The first token of each word, by its first character."""
    return {int(text.spans[index, 0]): int(index) for index in np.flatnonzero(text.begins)[::-1]}


def _without_prefix(core: Tokenizer) -> Tokenizer | None:
    """A tokenizer of the same words that puts nothing before a text; ``None`` where this one does
    not either.
    """
    frame = Tokenizer(
        models.WordLevel({}, unk_token="")
    )  # the parts alone: a vocabulary would be written out
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        if getattr(core, part) is not None:
            setattr(frame, part, getattr(core, part))
    parts = json.loads(frame.to_str())
    changed = {name: _bare(parts[name]) for name in ("normalizer", "pre_tokenizer")}
    if all(parts[name] == changed[name] for name in changed):
        return None
    bare = Tokenizer.from_str(json.dumps({**parts, **changed}))
    bare.model = core.model
    return bare


def _bare(part: Any) -> Any:
    """The description of a normalizer or pre-tokenizer that puts nothing before a text."""
    if not isinstance(part, dict) or part["type"] == "Prepend":
        return None
    changes = {"prepend_scheme": "never", "add_prefix_space": False}
    found = {name: changes.get(name, value) for name, value in part.items()}
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            found[name] = [each for each in map(_bare, part[name]) if each is not None]
    return found
