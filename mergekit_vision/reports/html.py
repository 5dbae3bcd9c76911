"""The report of a comparison: ``results.json``, pictures, and one HTML file that needs nothing else."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_vision.reports import figures
from mergekit_vision.reports.curves import TITLES, Curve, curves, draw_curves
from mergekit_vision.reports.findings import Best, best_rows, papers_of
from mergekit_vision.reports.noise import chance
from mergekit_vision.reports.style import as_svg, save_png
from mergekit_vision.reports.tables import comparison_table, count, mean_percent, percent, published
from mergekit_vision.support.console import logger, show
from mergekit_vision.support.files import replacing
from mergekit_vision.support.json_files import readable, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results = Mapping[str, Any]
Layers = Mapping[str, Mapping[str, Any]]
"""Linear name -> its ``block`` and ``kind``."""

NARROW, FIXED = "\u202f", "\u00a0"  # spaces at which no line breaks, the first a narrow one

_FLOAT = 4  # bytes of a parameter
_PIXELS = 96  # of an inch in CSS
_WIDEST = 560  # CSS pixels of a figure that may still be shrunk to a phone's width


class Picture(NamedTuple):
    """A figure in the report.

    Attributes:
        source: data URI of an SVG.
        alt: what it shows, for those who do not see it.
        width: in CSS pixels.
        height: in CSS pixels.
        long: whether it is to be scrolled, and not shrunk, where there is no room.
    """

    source: str
    alt: str
    width: int
    height: int
    long: bool


def write_comparison(results: Results, directory: Path) -> None:
    """Write ``results.json``, ``methods.png``, ``tasks.png`` and ``report.html``, each whole, and show the table.

    Args:
        results: what :class:`~mergekit_vision.runs.comparison.Comparison` found.
        directory: made when missing.
    """
    write_json(directory / "results.json", results)
    save_png(figures.draw_methods(results["rows"]), directory / "methods.png")
    save_png(figures.draw_tasks(results["rows"]), directory / "tasks.png")
    with replacing(directory / "report.html") as draft:
        draft.write_text(render(results), encoding="utf-8", errors="xmlcharrefreplace")
    show(comparison_table(results))
    logger.info("%s", summary(results))
    logger.info("report: %s", directory / "report.html")


def render(results: Results) -> str:
    """The report as one HTML document, without any link to another file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mergekit_vision.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"mean": mean_percent, "coefficient": _coefficient, "published": published}
    environment.filters |= {"percent": percent, "count": count, "seconds": _seconds, "plain": readable, "differing": _differing}
    page = environment.get_template("report.html").render(
        results=results,
        rows=results["rows"],
        methods=_methods(results),
        summary=summary(results),
        best=best_rows(results),
        sizes=_sizes(results),
        papers=papers_of(results),
        chance=percent(chance(row for row in _methods(results) if len(row["tasks"]) == len(results["tasks"]))),
        pictures=_pictures(results),
        chosen=_chosen(results),
        scales=_scales(results),
        curves={TITLES.get(name, name): _curves(name, found) for name, found in curves(results["rows"]).items()},
        routing={row["name"]: _routing(row, results["layers"]) for row in _methods(results) if row["routing"]},
    )
    return str(page)


def summary(results: Results) -> str:
    """What came out, in two or three sentences.

    >>> from mergekit_vision.reports.html import NARROW, summary
    >>> mean = {"accuracy": 0.7, "normalized": 0.93}
    >>> row = {"name": "ESM", "kind": "static", "mean": mean, "tasks": {"mnist": mean}, "extra_parameters": 0}
    >>> summary({"rows": [row], "parameters": 10}).replace(NARROW, " ")
    'ESM keeps 93 % of the experts’ accuracy in one model of the same size.'
    """
    best, sentences = best_rows(results), []
    if found := best.get("static"):
        sentences.append(f"{found.row['name']} {_reaches(found.row)} in one model of the same size{_rivals(found)}.")
    if found := best.get("dynamic"):
        extra = _whole(found.row["extra_parameters"] / results["parameters"])
        what = f"with {extra} more memory and a router"
        sentences.append(f"{found.row['name']} {_reaches(found.row)} {what}{_rivals(found)}.")
    if found := best.get("backbone"):
        sentences.append(f"The pre-trained model alone, zero-shot, {_reaches(found.row)}.")
    return " ".join(sentences)


def _rivals(best: Best) -> str:
    """Those that may be as good."""
    if len(best.rivals) > 2:
        every = "all " if len(best.rivals) == best.others else ""
        return f" ({every}{len(best.rivals)} others are within the noise of it)"
    return (
        f" ({' and '.join(best.rivals)} {'is' if len(best.rivals) == 1 else 'are'} within the noise of it)" if best.rivals else ""
    )


def _reaches(row: Mapping[str, Any]) -> str:
    kept, mean = row["mean"]["normalized"], row["mean"]["accuracy"]
    return f"has a mean accuracy of {_whole(mean)}" if kept is None else f"keeps {_whole(kept)} of the experts’ accuracy"


def _sizes(results: Results) -> list[Mapping[str, Any]]:
    """The rows on all tasks by their bytes a task; none where there is no oracle."""
    rows = [row for row in results["rows"] if "bytes" in row and len(row["tasks"]) == len(results["tasks"])]
    if not any(row["kind"] == "oracle" for row in rows):
        return []
    whole = {"bytes": {"task": _FLOAT * results["parameters"], "shared": 0}}
    rows += [{**row, **whole} for row in results["rows"] if row["kind"] == "experts"]
    return sorted(rows, key=lambda row: (row["bytes"]["task"], row["mean"]["accuracy"]))


def _methods(results: Results) -> list[Mapping[str, Any]]:
    return [row for row in results["rows"] if row["kind"] in ("static", "dynamic")]


# ------------------------------------------------------------------------------------------------------- pictures


def _pictures(results: Results) -> dict[str, Picture]:
    """The figures, with what they show in words; those without data are left out."""
    rows = results["rows"]
    means = "; ".join(f"{row['name']} {percent(row['mean']['accuracy'])}" for row in rows)
    found = {
        "methods": _picture(figures.draw_methods(rows), f"Bar chart of the mean accuracy in percent: {means}."),
        "tasks": _picture(figures.draw_tasks(rows), _tasks_in_words(rows)),
    }
    curves = _search_curves(results)
    if curves:
        chosen = {name: _top(points) for name, points in curves.items()}
        tops = "; ".join(f"{name} is best at {chosen[name]:g}" for name in curves)
        found["search"] = _picture(
            figures.draw_search(curves, chosen), f"Line chart of what was searched for by scaling coefficient. {tops}."
        )
    if results["energy"]:
        layers = results["layers"]
        found["energy"] = _picture(figures.draw_energy(results["energy"], layers), _energy_in_words(results["energy"], layers))
    if sizes := _sizes(results):
        smallest_first = sorted(sizes, key=lambda row: row["extra_parameters"])
        words = "; ".join(f"{row['name']} {percent(row['mean']['accuracy'])}" for row in smallest_first)
        found["sizes"] = _picture(
            figures.draw_sizes(sizes, results["parameters"]), f"Chart of accuracy by size, smallest first: {words}."
        )
    if len(results["similarity"]["tasks"]) > 1:
        found["similarity"] = _picture(
            figures.draw_similarity(**results["similarity"]), _similarity_in_words(results["similarity"])
        )
    return found


def _search_curves(results: Results) -> dict[str, list[Any]]:
    """Method -> what was searched, by coefficient; of a run whose rows are searched by two rules, those of the run's own."""
    key = "distance" if results["scale"] == "agreement" else "normalized"
    found = {row["name"]: sorted(row["search"], key=lambda p: p["coefficient"]) for row in _methods(results) if row["search"]}
    own = {name: points for name, points in found.items() if key in points[0]}
    return own or found


def _chosen(results: Results) -> str:
    """By what the drawn coefficients were chosen, ``agreement`` or ``search``; nothing where no row was searched."""
    points = next(iter(_search_curves(results).values()), None)
    return "" if points is None else "agreement" if "distance" in points[0] else "search"


def _scales(results: Results) -> list[Any]:
    """What was said of the coefficient, each once: of every method, for a row may say otherwise than the run."""
    said = [row.get("settings", {}).get("scale", results["scale"]) for row in _methods(results)]
    return list(dict.fromkeys(said)) or [results["scale"]]


def _top(points: list[Any]) -> float:
    """Coefficient with the best score."""
    best = min(points, key=lambda point: point["distance"] if "distance" in point else -point["normalized"])
    return float(best["coefficient"])


def _coefficient(row: Mapping[str, Any]) -> str:
    """At which coefficient a method was used; from the smallest to the largest where draws of proxy images led to several."""
    found = [draw["scale"] for draw in row.get("draws", ())] or [row["scale"]]
    if None in found:
        return "–"
    low, high = min(found), max(found)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


def _differing(row: Mapping[str, Any]) -> str:
    """What is otherwise with a row than by default."""
    return "; ".join(f"{name} ={FIXED}{readable(row['settings'][name])}" for name in row.get("differs", ()))


def _curves(name: str, found: Sequence[Curve]) -> Picture:
    """Accuracy by one setting."""
    words = "; ".join(f"{curve.label} from {_whole(curve.points[0].y)} to {_whole(curve.points[-1].y)}" for curve in found)
    return _picture(draw_curves(name, found), f"Line chart of the accuracy by {TITLES.get(name, name)}. {words}.")


def _routing(row: Mapping[str, Any], layers: Layers) -> Picture:
    shares = [share for layer in row["routing"].values() for share in layer.values()]
    words = f"On average {_whole(sum(shares) / len(shares))} of the images pick their own task’s expert."
    labels = {name: _label(layers[name]) for name in row["routing"]}
    return _picture(figures.draw_routing(row["routing"], labels), f"Heat map for {row['name']}, tasks by routed layers. {words}")


def _picture(figure: "Figure", alt: str) -> Picture:
    svg = base64.b64encode(as_svg(figure)).decode()
    width, height = (_PIXELS * side for side in figure.get_size_inches())
    long = bool(width > _WIDEST)
    enlarged = 1.0 if long else 1.2  # where there is room
    return Picture(f"data:image/svg+xml;base64,{svg}", alt, round(enlarged * width), round(enlarged * height), long)


def _tasks_in_words(rows: list[Mapping[str, Any]]) -> str:
    worst = "; ".join(f"{row['name']} is weakest on {row['worst']}" for row in rows if row["kind"] in ("static", "dynamic"))
    return f"Heat map of the accuracy of each model on each task. Relative to the experts, {worst}."


def _label(layer: Mapping[str, Any]) -> str:
    """A layer's block and kind."""
    return f"{layer['block']} {layer['kind']}"


def _energy_in_words(energy: Mapping[str, Mapping[str, Any]], layers: Layers) -> str:
    parts = []
    for layer, curve in energy.items():
        at = max(i for i, k in enumerate(curve["directions"]) if k <= max(1, curve["per_task"]))
        parts.append(f"{_label(layers[layer])}: {_whole(curve['esd'][at])} by ESD, {_whole(curve['svd'][at])} by SVD")
    return f"Line charts of shift energy kept by number of directions. With a task’s share of directions, {'; '.join(parts)}."


def _similarity_in_words(similarity: Mapping[str, Any]) -> str:
    tasks, cosine = similarity["tasks"], similarity["cosine"]
    pairs = [(cosine[i][j], tasks[i], tasks[j]) for i in range(len(tasks)) for j in range(i)]
    high, low = max(pairs), min(pairs)
    return (
        f"Matrix of cosines between task vectors. The most alike are {high[1]} and {high[2]} ({high[0]:.2f}), "
        f"the least {low[1]} and {low[2]} ({low[0]:.2f})."
    )


# -------------------------------------------------------------------------------------------------------- numbers


def _whole(share: float) -> str:
    """A share as a whole percentage, never broken before the sign."""
    return f"{100 * share:.0f}{NARROW}%"


def _seconds(value: float | None) -> str:
    """A time with about two digits: ``0.34 s``, ``12 s``, ``3 min 20 s``."""
    if value is None:
        return "–"
    if value < 10:
        return f"{value:.2g} s"
    seconds = round(value)
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min {seconds % 60} s"
