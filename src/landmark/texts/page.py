"""The HTML page of an explanation; it needs no network and no other file."""

from __future__ import annotations

import bisect
import html
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from landmark.data.characters import printable
from landmark.data.sources import Source, starts_of
from landmark.texts.passages import Passage, Span

LEAST = 0.0005  # smaller shares are left out of the page


@dataclass(frozen=True)
class View:
    """What the page shows for the whole answer, or for one of its tokens.

    Attributes:
        spans: retrieved blocks, by block.
        passages: the strongest, the strongest first.
    """

    spans: Sequence[Span]
    passages: Sequence[Passage]


def page(
    *, question: str, sources: Sequence[Source], tokens: Sequence[str], views: Sequence[View]
) -> str:
    """Returns the page; its look and its script are in ``page.html`` beside this file.

    The text is cut wherever a block that was read begins or ends, so that a page is not much larger
    than its text.

    Args:
        question: what was asked.
        sources: the texts.
        tokens: the texts of the answer's tokens.
        views: of the whole answer, then of each token.
    """
    cuts = _cuts(sources, views[0].spans)
    data = _data(tokens, views, cuts)
    parts = {
        "question": _escaped(question.strip()),
        "text": "".join(_sections(sources, cuts)),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = resources.files("landmark.texts").joinpath("page.html").read_text(encoding="utf-8")
    # Every second piece between two @@ is the name of a part.
    return "".join(
        parts.get(piece, piece) if number % 2 else piece
        for number, piece in enumerate(template.split("@@"))
    )


def _cuts(sources: Sequence[Source], spans: Sequence[Span]) -> list[int]:
    """Returns the characters where a piece of the text begins, and the number of all characters."""
    cuts = set(starts_of(sources))
    for span in spans:
        cuts |= {span.begin, span.end}
    return sorted(cuts)


def _sections(sources: Sequence[Source], cuts: Sequence[int]) -> Iterator[str]:
    """Yields the HTML of the sources, a ``span`` for each piece of their text."""
    for source, (start, end) in zip(sources, itertools.pairwise(starts_of(sources)), strict=True):
        inside = cuts[bisect.bisect_left(cuts, start) : bisect.bisect_right(cuts, end)]
        yield f"<section><h2>{_escaped(source.name)}</h2>\n<div class='text' dir='auto'>"
        for first, last in itertools.pairwise(inside):
            yield f"<span>{_escaped(source.text[first - start : last - start])}</span>"
        yield "</div></section>\n"


def _escaped(text: str) -> str:
    """Returns a text as HTML.

    A carriage return is written by its number, as the parser of a page would make a line end of it.
    Other control characters become U+FFFD, as many characters as there were.
    """
    parts = (printable(part) for part in text.split("\r"))
    return "&#13;".join(html.escape(part) for part in parts)


def _data(tokens: Sequence[str], views: Sequence[View], cuts: Sequence[int]) -> dict[str, Any]:
    """Returns what the script is given: the tokens and the views."""
    return {
        "tokens": list(tokens),
        "views": [
            {
                "spans": [_placed(span, cuts) for span in view.spans if span.weight >= LEAST],
                "passages": [
                    [*_placed(passage, cuts), passage.source, passage.line]
                    for passage in view.passages
                    if passage.weight >= LEAST
                ],
                "rest": round(1 - sum(span.weight for span in view.spans), 4),
            }
            for view in views
        ],
    }


def _placed(part: Span | Passage, cuts: Sequence[int]) -> list[Any]:
    """Returns the first piece of the text, the one after the last, and the share."""
    return [
        bisect.bisect_left(cuts, part.begin),
        bisect.bisect_left(cuts, part.end),
        round(part.weight, 4),
    ]
