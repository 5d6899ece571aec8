"""Pictures of results, drawn by matplotlib without a display."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from landmark.data import outputs
from landmark.data.characters import printable
from landmark.eval.results import PasskeyRow, PerplexityRow


def plot_passkey(rows: Sequence[PasskeyRow], path: str | Path) -> None:
    """Draws accuracy over length as lines, and over length and depth as a heat map.

    There is a line for each model and setting.

    The heat map adds up all landmark rows (all rows where there are none).

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    figure, (left, right) = subplots(2, (12.0, 4.8))
    for label, series in _series(rows).items():
        series.sort(key=lambda row: row.length)
        left.plot(
            [row.length for row in series],
            [100 * row.accuracy for row in series],
            marker="o",
            label=label,
        )
    left.set(
        xscale="log",
        xlabel="text tokens of the document",
        ylabel="answers right, %",
        ylim=(-3, 103),
    )
    left.set_title("accuracy over length")
    left.grid(alpha=0.3)
    left.legend(fontsize=7)
    _heat_map(right, [row for row in rows if row.attention == "landmark"] or list(rows))
    save(figure, path)


def plot_perplexity(rows: Sequence[PerplexityRow], path: str | Path) -> None:
    """Draws perplexity over evaluation length, a line for each model and setting.

    Points beyond the trained length are hollow.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    figure, (axes,) = subplots(1, (7.5, 4.8))
    groups: dict[str, list[PerplexityRow]] = {}
    for row in rows:
        groups.setdefault(_label(_perplexity_label(row)), []).append(row)
    for label, series in groups.items():
        series.sort(key=lambda row: row.length)
        (line,) = axes.plot(
            [row.length for row in series], [row.perplexity for row in series], label=label
        )
        for row in series:
            fill = "white" if row.beyond_trained else line.get_color()
            axes.plot(row.length, row.perplexity, "o", color=line.get_color(), markerfacecolor=fill)
    axes.set(
        xscale="log", yscale="log", xlabel="evaluation length, text tokens", ylabel="perplexity"
    )
    axes.set_title("perplexity over length (hollow: beyond the trained length)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    save(figure, path)


def subplots(columns: int, size: tuple[float, float]) -> tuple[Any, tuple[Any, ...]]:
    """Returns a figure and its axes in a row.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, tuple(axes[0])


def require_matplotlib() -> None:
    """Raises ``ModuleNotFoundError`` with the remedy when matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "pictures: expected matplotlib, which is not installed; run pip install "
            "'landmark-attention[viz]'"
        ) from None


def require_picture(path: str | Path, name: str) -> None:
    """Checks that a picture can be drawn and written, before anything is computed.

    Args:
        path: of the picture.
        name: of the parameter, for the message.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: no file can be written there, or a suffix that matplotlib has no format for.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = sorted(FigureCanvasAgg.filetypes.keys() - {"pgf"})  # pgf runs LaTeX
    if _format(path) not in known:
        raise ValueError(
            f"{name}: expected a picture named with .png, or {', '.join(known)}, got {path}; "
            "rename it"
        )
    outputs.require_writable(path, name)


def save(figure: Any, path: str | Path) -> None:
    """Writes ``figure`` to ``path``; makes its folder."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format=_format(path))
    outputs.write(path, picture.getvalue())


def _format(path: str | Path) -> str:
    return Path(path).suffix.removeprefix(".").lower() or "png"


def _label(text: str) -> str:
    """Returns a label that matplotlib draws as it stands.

    matplotlib reads formulas between dollars, and hides what begins with an underscore.
    """
    return " ".join(printable(text).replace("$", r"\$").split()).removeprefix("_")


def _heat_map(axes: Any, rows: Sequence[PasskeyRow]) -> None:
    lengths = sorted({row.length for row in rows})
    cells = [[float("nan")] * len(lengths) for _ in rows[0].depths]
    for column, length in enumerate(lengths):
        for bucket in range(len(cells)):
            depths = [row.depths[bucket] for row in rows if row.length == length]
            asked = sum(depth["asked"] for depth in depths)
            if asked:
                cells[bucket][column] = 100 * sum(depth["correct"] for depth in depths) / asked
    image = axes.imshow(cells, aspect="auto", vmin=0, vmax=100, cmap="viridis")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30)
    axes.set_yticks(range(len(cells)), [f"{depth['from']:.0%}" for depth in rows[0].depths])
    axes.set(xlabel="text tokens of the document", ylabel="place of the fact in the document")
    axes.set_title("answers right, %")
    axes.figure.colorbar(image, ax=axes)


def _series(rows: Sequence[PasskeyRow]) -> dict[str, list[PasskeyRow]]:
    groups: dict[str, list[PasskeyRow]] = {}
    for row in rows:
        if row.attention == "landmark":
            label = f"{row.model}, {row.granularity}, k={row.top_k}, {row.filler}"
        else:
            label = f"{row.model}, {row.attention} attention, {row.filler}"
        if row.task == "facts":
            label += f", {row.facts} facts"
        groups.setdefault(_label(label), []).append(row)
    return groups


def _perplexity_label(row: PerplexityRow) -> str:
    if row.top_k is None:
        return f"{row.model}, {row.attention} attention"
    if row.top_k == 0:
        return (
            f"{row.model}, no retrieval, attention size {row.settings['local_blocks'] + 2} blocks"
        )
    return f"{row.model}, {row.scheme}, local {row.local}, k={row.top_k}"
