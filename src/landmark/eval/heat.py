"""An explanation as one HTML page that needs nothing but itself: no network, no other file."""

from __future__ import annotations

import bisect
import html
import itertools
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from landmark.data.characters import printable
from landmark.data.sources import Source
from landmark.eval.explanation import Explanation, Passage, Span

LEAST = 0.0005  # shares below it are left out of the page


def page(explanation: Explanation) -> str:
    """Returns the page; its look and its script are in ``heat.html`` beside this file.

    The text is cut wherever a block that was read begins or ends, so that a page is not much larger
    than its text.
    """
    cuts = _cuts(explanation)
    parts = {
        "question": _escaped(explanation.question.strip()),
        "text": "".join(_sections(explanation.sources, cuts)),
        "data": json.dumps(_data(explanation, cuts), separators=(",", ":")).replace("<", "\\u003c"),
    }
    before = (
        resources.files("landmark.eval")
        .joinpath("heat.html")
        .read_text(encoding="utf-8")
        .split("@@")
    )
    return "".join(
        parts.get(part, part) if number % 2 else part for number, part in enumerate(before)
    )


def _cuts(explanation: Explanation) -> list[int]:
    """Characters where a piece of the text begins, and the number of all characters."""
    cuts = {0}
    for source in explanation.sources:
        cuts.add(max(cuts) + len(source.text))
    for span in explanation.spans():
        cuts |= {span.begin, span.end}
    return sorted(cuts)


def _sections(sources: Sequence[Source], cuts: Sequence[int]) -> Iterable[str]:
    start = 0
    for source in sources:
        inside = cuts[
            bisect.bisect_left(cuts, start) : bisect.bisect_right(cuts, start + len(source.text))
        ]
        ends = [cut - start for cut in inside]
        pieces = (_escaped(source.text[a:b]) for a, b in itertools.pairwise(ends))
        yield f"<section><h2>{_escaped(source.name)}</h2>\n<div class='text' dir='auto'>"
        yield from (f"<span>{piece}</span>" for piece in pieces)
        yield "</div></section>\n"
        start += len(source.text)


def _escaped(text: str) -> str:
    """Text as HTML; a carriage return by its number, as the parser of a page would make a line end
    of it.

    Other control characters become U+FFFD, as many characters as there were.
    """
    parts = (printable(part) for part in text.split("\r"))
    return "&#13;".join(html.escape(part) for part in parts)


def _data(explanation: Explanation, cuts: Sequence[int]) -> dict[str, Any]:
    """What the script knows: the tokens and, for the whole answer and then for each of them, what
    was read.
    """
    count = len(explanation.steps)
    spans = [explanation.spans(), *(step.spans for step in explanation.steps)]
    passages = [explanation.passages(), *(explanation.passages(step) for step in range(count))]
    return {
        "tokens": [step.token for step in explanation.steps],
        "views": [
            {
                "spans": [_placed(span, cuts) for span in read if span.weight >= LEAST],
                "passages": [
                    [*_placed(passage, cuts), passage.source, passage.line]
                    for passage in strongest
                    if passage.weight >= LEAST
                ],
                "rest": round(1 - sum(span.weight for span in read), 4),
            }
            for read, strongest in zip(spans, passages, strict=True)
        ],
    }


def _placed(part: Span | Passage, cuts: Sequence[int]) -> list[Any]:
    """First piece, the one after the last, and the share."""
    return [
        bisect.bisect_left(cuts, part.begin),
        bisect.bisect_left(cuts, part.end),
        round(part.weight, 4),
    ]
