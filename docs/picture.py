"""Draws the picture of README: a text in blocks, its landmarks, and what one query reads.

python docs/picture.py

It writes ``picture-light.svg`` and ``picture-dark.svg`` beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
FONT = "-apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"
TEXT_SIZE = 16
BLOCK_TEXT_SIZE = 15
WIDTH = 1016
HEIGHT = 432
MARGIN = 12
BLOCK_WIDTH = 115
BLOCK_HEIGHT = 84
GAP = 10.3
LANDMARK_WIDTH = 14
BLOCK_TOP = 178
BAR_HEIGHT = 84
ARC_DEPTH = 62
TOP_K = 2
LOCAL_BLOCKS = 2


@dataclass(frozen=True)
class Block:
    """One block of the text.

    Attributes:
        lines: its text.
        score: of its landmark, from 0 to 1; ``None`` where no landmark is scored.
    """

    lines: tuple[str, ...]
    score: float | None = None


BLOCKS = (
    Block(("The road", "ran past", "hedges."), 0.22),
    Block(("The key to", "the gate", "is 48213."), 0.95),
    Block(("Nobody was", "to be seen", "that day."), 0.12),
    Block(("A gate was", "shut with", "a lock."), 0.64),
    Block(("It rained", "on fields", "all day."), 0.3),
    Block(("The inn was", "closed and", "dark.")),
    Block(("He knocked", "twice. Then", "a voice:")),
    Block(("What is the", "key? It", "is")),
)
OWN = len(BLOCKS) - 1
OLDER = OWN - LOCAL_BLOCKS


@dataclass(frozen=True)
class Colours:
    """Colours of one variant."""

    ink: str
    quiet: str
    faint_fill: str
    faint_line: str
    faint_ink: str
    landmark: str
    faint_landmark: str
    retrieved: str
    retrieved_line: str
    local: str
    local_line: str
    query: str
    query_ink: str


LIGHT = Colours(
    ink="#1f2328",
    quiet="#59636e",
    faint_fill="#f6f8fa",
    faint_line="#d1d9e0",
    faint_ink="#818b98",
    landmark="#bc4c00",
    faint_landmark="#e0a37e",
    retrieved="#ffe6cc",
    retrieved_line="#bc4c00",
    local="#ddf0ff",
    local_line="#0969da",
    query="#0969da",
    query_ink="#ffffff",
)
DARK = Colours(
    ink="#f0f6fc",
    quiet="#9198a1",
    faint_fill="#151b23",
    faint_line="#3d444d",
    faint_ink="#7d8590",
    landmark="#f0883e",
    faint_landmark="#8a5a33",
    retrieved="#4a2a10",
    retrieved_line="#f0883e",
    local="#10294a",
    local_line="#4493f8",
    query="#4493f8",
    query_ink="#0d1117",
)


def main() -> None:
    """Writes both variants."""
    for name, colours in (("light", LIGHT), ("dark", DARK)):
        (FOLDER / f"picture-{name}.svg").write_text(draw(colours), encoding="utf-8")


def draw(colours: Colours) -> str:
    """Returns one variant as SVG."""
    retrieved = best_blocks()
    parts = [
        title(colours),
        *(group(colours, *each) for each in groups()),
        *(arc(colours, number) for number in [*retrieved, *range(OLDER, OWN)]),
        *(block(colours, number, retrieved) for number in range(len(BLOCKS))),
        *(bar(colours, number, retrieved) for number in range(OLDER)),
        query(colours),
        steps(colours),
        legend(colours),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" font-family="{FONT}">',
            *parts,
            "</svg>\n",
        ]
    )


def best_blocks() -> list[int]:
    """Returns the older blocks with the ``TOP_K`` highest scores, in the order of the text."""
    by_score = sorted(range(OLDER), key=lambda number: -(BLOCKS[number].score or 0.0))
    return sorted(by_score[:TOP_K])


def left(number: int) -> float:
    """Returns where a block begins."""
    return MARGIN + number * (BLOCK_WIDTH + GAP)


def words(
    x: float,
    y: float,
    text: str,
    colour: str,
    *,
    anchor: str = "start",
    weight: str = "normal",
    size: int = TEXT_SIZE,
) -> str:
    """Returns one line of text."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" '
        f'font-weight="{weight}" font-size="{size}">{escape(text)}</text>'
    )


def box(x: float, y: float, width: float, height: float, style: str, *, radius: float = 6) -> str:
    """Returns a rectangle."""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'rx="{radius}" {style}/>'
    )


def title(colours: Colours) -> str:
    """Returns what a screen reader says."""
    return f"<title>What one query reads of a text in blocks (top_k = {TOP_K})</title>"


def groups() -> list[tuple[int, int, str, str]]:
    """Returns first and last block of each group, its name and what is read of it."""
    return [
        (0, OLDER - 1, "older blocks", f"the top_k = {TOP_K} best are read"),
        (OLDER, OWN - 1, "local blocks", "always read"),
        (OWN, OWN, "own block", "always read"),
    ]


def group(colours: Colours, first: int, last: int, name: str, read: str) -> str:
    """Returns the bracket above some blocks."""
    begin = left(first)
    end = left(last) + BLOCK_WIDTH
    middle = (begin + end) / 2
    return "\n".join(
        [
            words(middle, 20, name, colours.ink, anchor="middle", weight="600"),
            words(middle, 40, read, colours.quiet, anchor="middle"),
            f'<path d="M {begin:.1f} 58 V 52 H {end:.1f} V 58" fill="none" '
            f'stroke="{colours.quiet}"/>',
        ]
    )


def block(colours: Colours, number: int, retrieved: list[int]) -> str:
    """Returns a block with its text and, where it is finished, its landmark."""
    x = left(number)
    fill = colours.faint_fill
    line = colours.faint_line
    ink = colours.faint_ink
    landmark = colours.faint_landmark
    if number in retrieved:
        fill = colours.retrieved
        line = colours.retrieved_line
    if number >= OLDER:
        fill = colours.local
        line = colours.local_line
    if number in retrieved or number >= OLDER:
        ink = colours.ink
        landmark = colours.landmark
    parts = [box(x, BLOCK_TOP, BLOCK_WIDTH, BLOCK_HEIGHT, f'fill="{fill}" stroke="{line}"')]
    if number < OWN:
        right = x + BLOCK_WIDTH - LANDMARK_WIDTH
        parts.append(
            box(right, BLOCK_TOP, LANDMARK_WIDTH, BLOCK_HEIGHT, f'fill="{landmark}"', radius=4)
        )
    for row, text in enumerate(BLOCKS[number].lines):
        if number < OWN or row < len(BLOCKS[number].lines) - 1:
            y = BLOCK_TOP + 24 + 22 * row
            parts.append(words(x + 7, y, text, ink, size=BLOCK_TEXT_SIZE))
    return "\n".join(parts)


def bar(colours: Colours, number: int, retrieved: list[int]) -> str:
    """Returns the score of a landmark as a bar above it."""
    score = BLOCKS[number].score or 0.0
    height = BAR_HEIGHT * score
    x = left(number) + BLOCK_WIDTH - LANDMARK_WIDTH
    y = BLOCK_TOP - 8 - height
    chosen = number in retrieved
    colour = colours.landmark if chosen else colours.faint_landmark
    ink = colours.ink if chosen else colours.faint_ink
    label = words(
        x - 6,
        BLOCK_TOP - 12,
        f"{score:.2f}",
        ink,
        anchor="end",
        weight="600" if chosen else "normal",
    )
    return box(x, y, LANDMARK_WIDTH, height, f'fill="{colour}"', radius=2) + "\n" + label


def query_place() -> tuple[float, float]:
    """Returns the middle of the query's lower edge."""
    return left(OWN) + 20, BLOCK_TOP + 78


def query(colours: Colours) -> str:
    """Returns the last word of the text, which asks."""
    x, y = query_place()
    return "\n".join(
        [
            box(x - 16, y - 25, 32, 25, f'fill="{colours.query}"', radius=5),
            words(
                x, y - 7, BLOCKS[OWN].lines[-1], colours.query_ink, anchor="middle", weight="600"
            ),
            words(x + 22, y - 7, "query", colours.query, weight="600"),
        ]
    )


def arc(colours: Colours, number: int) -> str:
    """Returns the way from the query to a block that it reads, with an arrow at the block."""
    end = left(number) + (BLOCK_WIDTH - LANDMARK_WIDTH) / 2
    begin, _ = query_place()
    floor = BLOCK_TOP + BLOCK_HEIGHT
    depth = floor + 14 + ARC_DEPTH * (begin - end) / (begin - left(0))
    colour = colours.retrieved_line if number < OLDER else colours.local_line
    tip = floor + 4
    return "\n".join(
        [
            f'<path d="M {begin:.1f} {floor - 6} C {begin:.1f} {depth + 26:.1f} {end:.1f} '
            f'{depth + 26:.1f} {end:.1f} {tip + 8}" fill="none" stroke="{colour}" '
            'stroke-width="2"/>',
            f'<path d="M {end:.1f} {tip} l -5 10 h 10 z" fill="{colour}"/>',
        ]
    )


def steps(colours: Colours) -> str:
    """Returns the two sentences below."""
    y = BLOCK_TOP + BLOCK_HEIGHT + 98
    first = "1. The query scores the landmarks of all older blocks and keeps the best."
    second = (
        "2. It attends to the text of these, of the local blocks and of its own, in one softmax."
    )
    return "\n".join(
        [words(MARGIN, y, first, colours.ink), words(MARGIN, y + 24, second, colours.ink)]
    )


def legend(colours: Colours) -> str:
    """Returns what the colours mean."""
    y = HEIGHT - 14
    x = float(MARGIN)
    parts = []
    for fill, line, text, room in (
        (colours.landmark, colours.landmark, "landmark", 114),
        (colours.retrieved, colours.retrieved_line, "retrieved block", 160),
        (colours.local, colours.local_line, "local or own block", 184),
        (
            colours.faint_fill,
            colours.faint_line,
            "not read: stays on the GPU, in host memory or on disk",
            0,
        ),
    ):
        parts.append(box(x, y - 13, 16, 16, f'fill="{fill}" stroke="{line}"', radius=3))
        parts.append(words(x + 23, y, text, colours.quiet))
        x += room
    return "\n".join(parts)


if __name__ == "__main__":
    main()
