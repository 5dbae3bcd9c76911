"""Pictures of results."""

from collections.abc import Mapping, Sequence
from math import ceil, inf, log2, nan
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_vision.reports.noise import leads
from mergekit_vision.reports.style import COLORS, GRAY, INK, RULE, WIDTH, empty_figure, legend, named, strokes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DISTANCE = "distance from the experts on proxy images"
_WIDE = 16  # columns of a heat map, above which its cells are smaller
_LABEL = 64  # letters of a line's name
_BELOW = 24  # letters of a column's name
_BESIDE_BARS, _SHORT = 28, 20  # letters of a bar's name, and up to how many there is room for larger ones


def draw_methods(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Bars of the mean accuracy of each method, between the backbone's and the experts'.

    Args:
        rows: those of a comparison, in the order to draw from below; accuracies in [0, 1].
    """
    with empty_figure(WIDTH, 1.1 + 0.33 * len(rows)) as figure:
        axes = figure.add_subplot()
        for position, row in enumerate(rows):
            mean, kept = 100 * row["mean"]["accuracy"], row["mean"]["normalized"]
            axes.barh(position, mean, height=0.68, color=COLORS[row["kind"]])
            beside: dict[str, Any] = {"xy": (mean, position), "textcoords": "offset points", "va": "center"}
            axes.annotate(f"{mean:.1f}", xytext=(4, 0), weight="bold", **beside)
            if kept is not None and row["kind"] != "experts":
                axes.annotate(f"({100 * kept:.0f})", xytext=(36, 0), color=GRAY, **beside)
        names = [named(row["name"], _BESIDE_BARS) for row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=10 if max(map(len, names)) <= _SHORT else 9)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xticks(range(0, 101, 20))
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.xaxis.grid(color=RULE, linewidth=0.7)
        axes.set_xlabel("mean accuracy over tasks, %\n(in brackets: % of the experts)", loc="left")
        _key(figure, [kind for kind in ("static", "dynamic", "oracle") if any(row["kind"] == kind for row in rows)])
    return figure


def _key(figure: "Figure", kinds: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    labels = {"static": "one plain encoder", "dynamic": "with routed experts", "oracle": "oracle: told the task"}
    handles = [Patch(color=COLORS[kind], label=labels[kind]) for kind in kinds]
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)


def draw_sizes(rows: Sequence[Mapping[str, Any]], parameters: int) -> "Figure":
    """Mean accuracy of each model by its size, in encoders; of the static ones, which all have size 1, the best one is named.

    Args:
        rows: those of a comparison; accuracies in [0, 1].
        parameters: of one encoder.
    """
    best = max((row for row in rows if row["kind"] == "static"), key=lambda row: row["mean"]["accuracy"], default=None)
    points = [(1 + row["extra_parameters"] / parameters, 100 * row["mean"]["accuracy"], row) for row in rows]
    ticks = [2**power for power in range(1 + ceil(log2(max(2.0, *(x for x, _, _ in points)))))]
    low, high = min(y for _, y, _ in points), max(y for _, y, _ in points)
    letter = 0.035 * (high - low + 1)  # what a line of letters takes of the axis
    with empty_figure(WIDTH, 3.6) as figure:
        axes = figure.add_subplot()
        above = (1.0, inf)  # where the last name stands
        for x, y, row in sorted(points, key=lambda point: -point[1]):
            axes.plot(x, y, marker="o", markersize=6, color=COLORS[row["kind"]], markeredgecolor="white", linestyle="none")
            if row["kind"] != "static" or row is best:
                beside = min(y, above[1] - 1.6 * letter) if abs(log2(x / above[0])) < 1 else y
                axes.annotate(
                    named(row["name"], _BELOW), (x, beside - letter / 2), xytext=(6, 0), textcoords="offset points", fontsize=8.5
                )
                above = (x, beside)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xlim(0.9, 1.6 * ticks[-1])  # with room for the last name
        axes.minorticks_off()
        axes.grid(color=RULE, linewidth=0.7)
        axes.set_xlabel("size, in encoders")
        axes.set_ylabel("mean accuracy over tasks, %")
        _key(figure, [kind for kind in ("static", "dynamic", "oracle") if any(row["kind"] == kind for row in rows)])
    return figure


def draw_tasks(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Heat map of accuracies, methods by tasks, in %; the shade is the share of the task's own expert.

    The method that is better on a task than all others, by more than noise, is bold.

    Args:
        rows: those of a comparison, from top to bottom; accuracies in [0, 1].
    """
    tasks = list(rows[0]["tasks"])
    cells = [[row["tasks"].get(task) for task in tasks] for row in rows]  # a row may be of fewer tasks
    values = [[100 * cell["accuracy"] if cell else nan for cell in line] for line in cells]
    shades = [[_shade(cell) for cell in line] for line in cells]
    known = [shade for line in shades for shade in line if shade == shade]
    bold = [[_leads(row, rows, task) for task in tasks] for row in rows]
    low = min(90.0, 10 * (min(known) // 10))
    table = _Table([row["name"] for row in rows], tasks, values, shades, bold)
    return _heat_map(table, "accuracy, %\n(shade: % of the task's own expert)", low, max(100.0, *known))


def _leads(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], task: str) -> bool:
    """Whether a method is the best of all on a task."""
    methods = [other for other in rows if other["kind"] in ("static", "dynamic") and task in other["tasks"]]
    rivals = [other for other in methods if other is not row]
    return row in methods and bool(rivals) and leads(row, rivals, task)


def _shade(cell: Mapping[str, Any] | None) -> float:
    """Share of the task's own expert, in %."""
    if cell is None:
        return nan
    return 100.0 if cell["normalized"] is None else 100.0 * float(cell["normalized"])


def draw_similarity(tasks: Sequence[str], cosine: Sequence[Sequence[float]]) -> "Figure":
    """Matrix of the cosines ``[T, T]`` between task vectors; shaded by those between two of them."""
    values = [[nan if i == j else round(value, 2) + 0.0 for j, value in enumerate(line)] for i, line in enumerate(cosine)]
    known = [value for line in values for value in line if value == value]
    low, high = min([0.0, *known]), max([0.01, *known])
    return _heat_map(_Table(tasks, tasks, values, values, form="{:.2f}"), "cosine of two task vectors", low, high)


def draw_routing(shares: Mapping[str, Mapping[str, float]], labels: Mapping[str, str]) -> "Figure":
    """Heat map of how often images pick their own task's expert: tasks by routed layers, in %.

    Args:
        shares: layer -> task -> share in [0, 1].
        labels: layer -> how it is named in the picture.
    """
    layers, tasks = list(shares), list(next(iter(shares.values())))
    values = [[100 * shares[layer][task] for layer in layers] for task in tasks]
    table = _Table(tasks, [labels[layer] for layer in layers], values, values)
    return _heat_map(table, "images that pick their own task's expert, %", 0.0, 100.0)


class _Table(NamedTuple):
    """What a heat map shows: values as numbers, shades as colors, NaN for nothing."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    shades: Sequence[Sequence[float]]
    bold: Sequence[Sequence[bool]] | None = None
    form: str = "{:.0f}"


def _heat_map(table: _Table, label: str, low: float, high: float) -> "Figure":
    from matplotlib import colormaps

    table = table._replace(rows=list(map(named, table.rows)), columns=[named(name, _BELOW) for name in table.columns])
    width, height = len(table.columns), len(table.rows)
    cell, size = (0.46, 9) if width <= _WIDE else (0.32, 8)
    left, below = (max(map(len, names)) for names in (table.rows, table.columns))
    sides = 0.085 * left * (2 if width > _WIDE else 1)
    with empty_figure(max(0.5 + sides + cell * width, 1.6 + sides, 3.6), 1.4 + 0.05 * below + 0.31 * height) as figure:
        axes = figure.add_subplot()
        shade = colormaps["YlGnBu"]
        picture = axes.imshow(table.shades, vmin=low, vmax=high, cmap=shade, aspect="auto")
        axes.set_yticks(range(height), table.rows)
        axes.tick_params(labelright=width > _WIDE)  # where a phone shows one end at a time
        axes.set_xticks(range(width), table.columns, rotation=45, ha="right", rotation_mode="anchor")
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)
        axes.set_xticks([x - 0.5 for x in range(1, width)], minor=True)
        axes.set_yticks([y - 0.5 for y in range(1, height)], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        for row, line in enumerate(table.values):
            for column, value in enumerate(line):
                if value == value:
                    red, green, blue, _ = shade((table.shades[row][column] - low) / (high - low))
                    color = INK if 0.3 * red + 0.6 * green + 0.1 * blue > 0.55 else "white"
                    weight = "bold" if table.bold and table.bold[row][column] else "normal"
                    text = table.form.format(value)
                    shown = axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size, weight=weight)
                    shown.set_in_layout(False)  # inside its cell: measuring hundreds of them takes most of the time
        bar = figure.colorbar(picture, ax=axes, location="top", aspect=40, pad=0.1 / height, anchor=(0.0, 0.0), ticks=[low, high])
        ends = bar.ax.set_xticklabels([table.form.format(low), table.form.format(high)])
        ends[0].set_horizontalalignment("left")
        ends[1].set_horizontalalignment("right")
        bar.set_label(label, loc="left")
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0)
    return figure


def draw_search(curves: Mapping[str, Sequence[Mapping[str, float]]], chosen: Mapping[str, float]) -> "Figure":
    """Curves of the coefficient search, the chosen ones marked: normalized accuracy on ``val``, or distance from the experts.

    Args:
        curves: method -> points with ``coefficient`` and ``normalized`` (in [0, 1]) or ``distance``, of one kind, ascending.
        chosen: method -> coefficient.
    """
    labeled = any("normalized" in point for points in curves.values() for point in points)
    key, factor, label = ("normalized", 100, "share of the experts on val, %") if labeled else ("distance", 1, _DISTANCE)
    joined = _joined(curves)
    with empty_figure(WIDTH, 3.6) as figure:
        axes = figure.add_subplot()
        for (names, points), stroke in zip(joined, strokes(), strict=False):
            x = [point["coefficient"] for point in points]
            y = [factor * point[key] for point in points]
            axes.plot(x, y, **stroke, linewidth=1.6, marker=".", markersize=4, label=named(", ".join(names), _LABEL))
            best = x.index(chosen[names[0]])
            axes.plot(x[best], y[best], marker="o", markersize=8, color=stroke["color"], markeredgecolor="white")
        ticks = [0.125, 0.25, 0.5, 1, 2, 3]
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(color=RULE, linewidth=0.7)
        axes.set_xlabel("scaling coefficient")
        axes.set_ylabel(label)
        legend(figure, [named(", ".join(names), _LABEL) for names, _ in joined])
    return figure


def _joined(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> list[tuple[list[str], Sequence[Mapping[str, float]]]]:
    """Equal curves once, with the names of all: a method that builds on another one searches with it."""
    names: dict[str, list[str]] = {}
    for name, points in curves.items():
        names.setdefault(repr(points), []).append(name)
    return [(same, curves[same[0]]) for same in names.values()]


def draw_energy(energy: Mapping[str, Mapping[str, Any]], layers: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Share of shift energy by number of directions, a panel for each kind of layer: ESD solid, SVD dashed.

    Args:
        energy: layer -> ``directions``, ``esd``, ``svd`` (shares in [0, 1]) and ``per_task``.
        layers: layer -> its ``kind`` and ``block``.
    """
    from matplotlib.lines import Line2D

    kinds = list(dict.fromkeys(layers[name]["kind"] for name in energy))
    blocks = list(dict.fromkeys(layers[name]["block"] for name in energy))
    colors = dict(zip(blocks, ("#7fb3c8", "#3a6ea5", "#1d2f55"), strict=False))
    with empty_figure(WIDTH, 0.9 + 2.0 * ((len(kinds) + 1) // 2)) as figure:
        panels = figure.subplots((len(kinds) + 1) // 2, 2, squeeze=False, sharey=True).flatten()
        for panel in panels[len(kinds) :]:
            panel.set_visible(False)
        for axes, kind in zip(panels, kinds, strict=False):
            for name, curve in energy.items():
                if layers[name]["kind"] == kind:
                    color = colors[layers[name]["block"]]
                    axes.plot(curve["directions"], [100 * share for share in curve["esd"]], color=color, linewidth=1.8)
                    axes.plot(curve["directions"], [100 * share for share in curve["svd"]], color=color, dashes=(3, 2))
                    axes.axvline(curve["per_task"], color=GRAY, linewidth=0.8, dashes=(1, 2))
            axes.set(title=kind, xscale="log", ylim=(0, 103), xlabel="directions kept")
            axes.grid(color=RULE, linewidth=0.7)
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        figure.supylabel("shift energy kept, %", fontsize=10)
        keys = [Line2D([], [], color=colors[block], linewidth=1.8, label=f"block {block}") for block in blocks]
        keys += [Line2D([], [], color=GRAY, label="ESD"), Line2D([], [], color=GRAY, dashes=(3, 2), label="SVD")]
        figure.legend(handles=keys, loc="outside upper left", ncols=5, frameon=False, fontsize=9)
    return figure
