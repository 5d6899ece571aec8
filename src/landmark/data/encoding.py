"""Encodes texts of any length, with the ids that a tokenizer would give for the whole text.

No special token is added; ``row_start`` gives those that a row begins with. A text that continues
another one gets no prefix either, such as the space that many tokenizers put before a text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer, models

PIECE = 1 << 16  # characters encoded at once
OVERLAP = 1 << 10  # further characters, which the next piece has as well
PIECES = os.cpu_count() or 1  # pieces encoded in parallel between two reports

# Takes what is being done, how much of it is done, and how much there is (0: not known).
Progress = Callable[[str, int, int], None]


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

    def tokens_of(self, begin: int, end: int) -> range:
        """Returns the tokens that hold one of the characters ``begin`` to ``end - 1``.

        Raises:
            ValueError: none does, as a tokenizer may drop characters.
        """
        holds = (self.spans[:, 0] < end) & (self.spans[:, 1] > begin)
        found = np.flatnonzero(holds)
        if len(found) == 0:
            raise ValueError(
                f"expected tokens of the characters {begin} to {end}, got none: the tokenizer "
                "drops them; use another one"
            )
        return range(int(found[0]), int(found[-1]) + 1)


class Seam(NamedTuple):
    """Where two overlapping pieces are joined.

    Attributes:
        before: tokens that are kept of the piece before.
        after: tokens that are dropped of the piece after.
    """

    before: int
    after: int


class TextEncoder:
    """Encodes texts with a tokenizer of the package ``tokenizers``.

    The tokenizer neither truncates nor pads from then on.
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
        """Whether the tokenizer may put a prefix before a text."""
        return self._bare is not None

    def encode(
        self, text: str, *, continues: bool = False, progress: Progress | None = None
    ) -> Encoded:
        """Returns the tokens of a text; special tokens only where the text has them by name.

        A long text is encoded in pieces that overlap. Two pieces are joined where they agree. Where
        they do not, longer pieces are tried, in the end the whole text.

        Args:
            text: its characters.
            continues: whether it continues another text, so that the tokenizer's prefix is left
                out.
            progress: called after some pieces.
        """
        piece = PIECE
        overlap = OVERLAP
        while True:
            found = self._in_pieces(text, piece, overlap, continues=continues, progress=progress)
            if found is not None:
                return found
            piece = 2 * piece
            overlap = 2 * overlap

    def _in_pieces(
        self, text: str, piece: int, overlap: int, *, continues: bool, progress: Progress | None
    ) -> Encoded | None:
        """Returns the tokens, ``None`` where two pieces do not agree on their overlap."""
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
                run = overlap // 4
                seam = self._seam(done[-1], found, limit=start + overlap - run, run=run)
                if seam is None:
                    return None
                done[-1:] = [done[-1][: seam.before], found[seam.after :]]
            if progress is not None:
                end = min(len(text), some[-1] + piece + overlap)
                progress("characters tokenised", end, len(text))
        return _joined(done)

    def _batch(self, texts: list[str]) -> list[Encoding]:
        found: list[Encoding] = self.core.encode_batch(texts, add_special_tokens=False)
        return found

    def _seam(self, before: Encoded, after: Encoded, *, limit: int, run: int) -> Seam | None:
        """Returns where two overlapping pieces may be joined.

        The last tokens that end by the character ``limit`` have to be the same in both for at least
        ``run`` characters. Among them a word has to begin, as words do not depend on each other. In
        byte-pair encoding it need not: pairs are merged the same way inside a word wherever the
        same tokens are neighbours, while other models weigh the whole word.

        Returns:
            the seam behind these tokens, ``None`` where there is none.
        """
        left = _ending_by(before, limit)
        right = _ending_by(after, limit)
        has_border = isinstance(self.core.model, models.BPE)
        for back in range(1, min(left, right) + 1):
            ours = left - back
            theirs = right - back
            if before.ids[ours] != after.ids[theirs]:
                return None
            if (before.spans[ours] != after.spans[theirs]).any():
                return None
            if before.begins[ours] and after.begins[theirs]:
                has_border = True
            if has_border and before.spans[ours, 0] <= limit - run:
                return Seam(left, right)
        return None

    def _continued(self, text: str, encoding: Encoding) -> Encoded:
        """Returns the tokens of a text that continues another one, without the prefix.

        Up to the first border of words that both encodings have, the tokens are those of the
        tokenizer without a prefix; from there on they are those in ``encoding``.
        """
        whole = _encoded(encoding)
        if self._bare is None:
            return whole
        special = 0
        while special < len(whole) and not self._is_written(text, whole[special : special + 1]):
            special += 1
        end = int(whole.spans[special, 0]) if special < len(whole) else len(text)
        bare = _encoded(self._bare.encode(text[:end], add_special_tokens=False))
        ours = {**_borders(bare), end: len(bare)}
        theirs = {**_borders(whole), end: special}
        border = min(
            character
            for character in theirs
            if character in ours and (character > 0 or character == end)
        )
        return _joined([bare[: ours[border]], whole[theirs[border] :]])

    def _is_written(self, text: str, token: Encoded) -> bool:
        """Returns whether one token is an added token that the text has by name."""
        name = self._added.get(int(token.ids[0]))
        begin, end = token.spans[0]
        return name is not None and name in text[begin:end]


def _ending_by(text: Encoded, limit: int) -> int:
    """Returns how many tokens end by the character ``limit``."""
    ends = np.maximum.accumulate(text.spans[:, 1])
    return int(np.searchsorted(ends, limit, side="right"))


def _encoded(encoding: Encoding, start: int = 0) -> Encoded:
    """Returns the tokens of a text whose first character is number ``start``."""
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
    """Returns the first token of each word, by its first character."""
    return {int(text.spans[index, 0]): int(index) for index in np.flatnonzero(text.begins)[::-1]}


def _without_prefix(core: Tokenizer) -> Tokenizer | None:
    """Returns the tokenizer without its prefix; ``None`` where it puts nothing before a text."""
    # Only the other parts are needed as JSON: a vocabulary would be written out as well.
    frame = Tokenizer(models.WordLevel({}, unk_token=""))
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
    """Returns the description of a normalizer or pre-tokenizer without its prefix."""
    if not isinstance(part, dict) or part["type"] == "Prepend":
        return None
    changes = {"prepend_scheme": "never", "add_prefix_space": False}
    found = {name: changes.get(name, value) for name, value in part.items()}
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            found[name] = [each for each in map(_bare, part[name]) if each is not None]
    return found
