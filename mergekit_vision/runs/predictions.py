"""Predictions on a folder of images, gathered from all processes and written as a table."""

import csv
from pathlib import Path

from rich.markup import escape
from rich.table import Table
from torch import Tensor

from mergekit_vision.support.console import show
from mergekit_vision.support.files import replacing
from mergekit_vision.support.team import Team

_SHOWN = 20


class Predictions:
    """Collects the most probable classes of each image.

    Args:
        task: whose head classifies.
        classes: its class names.
        paths: the images, by the index that comes with each batch.
        top: how many classes an image gets.
    """

    def __init__(self, task: str, classes: tuple[str, ...], paths: tuple[Path, ...], top: int = 3) -> None:
        self.task, self.classes, self.paths = task, classes, paths
        self.top = min(top, len(classes))
        self.rows: dict[int, list[tuple[str, float]]] = {}

    def add(self, indices: Tensor, probabilities: Tensor) -> None:
        """Take one batch: indices ``[N]`` into ``paths`` and probabilities ``[N, classes]``."""
        best = probabilities.float().topk(self.top, dim=-1)
        for index, classes, values in zip(indices.tolist(), best.indices.tolist(), best.values.tolist(), strict=True):
            self.rows[index] = [(self.classes[label], value) for label, value in zip(classes, values, strict=True)]

    def gather(self, team: Team) -> None:
        """Collect the rows of all processes; each must call it, also one that had no image."""
        self.rows = {index: row for part in team.gather(self.rows) for index, row in part.items()}

    def write(self, path: Path) -> None:
        """Write ``path`` (CSV) and show the beginning."""
        table = Table(title=escape(f"{self.task} → {path}"), title_justify="left")
        for name in ("image", "class", "probability %"):
            table.add_column(name)
        with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["image", *(f"{what}_{n}" for n in range(1, self.top + 1) for what in ("class", "probability"))])
            for position, index in enumerate(sorted(self.rows)):
                row = self.rows[index]
                writer.writerow([self.paths[index], *(item for name, value in row for item in (name, f"{value:.6f}"))])
                if position < _SHOWN:
                    table.add_row(escape(self.paths[index].name), escape(row[0][0]), f"{100 * row[0][1]:.1f}")
        if len(self.rows) > _SHOWN:
            table.add_row("…", f"{len(self.rows) - _SHOWN} more in the file", "")
        show(table)
