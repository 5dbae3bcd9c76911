"""The figure of :mod:`benchmarks.merging`: how cost grows with the number of tasks and with the width."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

COSTS = {"seconds": "wall time, s", "peak_MiB": "peak anonymous memory, MiB"}
STYLES = {"ours": "-", "textbook": "--"}


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draw time and memory against T, for the narrowest model, and against width, one model each, for the smallest T."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "seconds" in row]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    model = min(rows, key=lambda row: row["width"])["model"]
    tasks = min(row["tasks"] for row in rows)
    of_width = {row["width"]: row["model"] for row in reversed(rows)}
    panels = {
        "tasks": ("T", model, [row for row in rows if row["model"] == model]),
        "width": (
            "width",
            f"T = {tasks}",
            [row for row in rows if row["tasks"] == tasks and of_width[row["width"]] == row["model"]],
        ),
    }
    figure = Figure(figsize=(10, 7), layout="constrained")
    cut = {(row["layers"], row["of_layers"]) for row in rows if row["layers"] < row["of_layers"]}
    if cut:
        figure.suptitle("cut to the first blocks: " + ", ".join(f"{kept} of {all_}" for kept, all_ in sorted(cut)))
    for place, (cost, name) in enumerate(COSTS.items()):
        for column, (x, (x_label, title, chosen)) in enumerate(panels.items()):
            axes = figure.add_subplot(2, 2, 2 * place + column + 1, title=title, xlabel=x_label, ylabel=name)
            for number, method in enumerate(methods):
                for implementation, style in STYLES.items():
                    points = _points(chosen, method, implementation, x, cost)
                    if points:
                        axes.plot(*zip(*points, strict=True), f"C{number}o{style}", label=f"{method}, {implementation}")
            _ticks(axes, sorted({row[x] for row in chosen}))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=150)
    return path


def _points(rows: Iterable[dict[str, Any]], method: str, implementation: str, x: str, cost: str) -> list[tuple[float, float]]:
    wanted = (row for row in rows if (row["method"], row["implementation"]) == (method, implementation))
    return sorted((row[x], row[cost]) for row in wanted)


def _ticks(axes: Any, values: list[float]) -> None:
    """Label the measured places; from zero on, so that what is linear looks it."""
    axes.set_xticks(values, [str(value) for value in values])
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
