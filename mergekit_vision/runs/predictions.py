"""Predictions on a folder of images, gathered from all processes and written as a table."""

import csv
from pathlib import Path

from rich.table import Table
from torch import Tensor

from mergekit_vision.errors import InputError
from mergekit_vision.support.console import as_markup, show
from mergekit_vision.support.files import replacing
from mergekit_vision.support.fingerprints import digest
from mergekit_vision.support.team import Team

_SHOWN = 20
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "'")
"""What cells begin with that spreadsheets calculate, and the apostrophe that keeps them from it."""


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

    def check_alike(self, team: Team) -> None:
        """Refuse processes that do not see the same images: each has listed them, and batches bring indices alone.

        Raises:
            InputError: on every process.
        """
        first, *others = team.gather((len(self.paths), digest(*(path.name for path in self.paths))))
        for rank, seen in enumerate(others, start=1):
            if seen != first:
                place = self.paths[0].parent
                problem = f"process {rank} of {team.size} sees other images than process 0 ({seen[0]} and {first[0]})"
                raise InputError(f"{place}: {problem}; give all processes the same, and change none while they start")

    def gather(self, team: Team) -> None:
        """Collect the rows of all processes; each must call it, also one that had no image.

        Raises:
            RuntimeError: when there are not as many as images.
        """
        self.rows = {index: row for part in team.gather(self.rows) for index, row in part.items()}
        if len(self.rows) != len(self.paths):
            raise RuntimeError(f"predicted {len(self.rows)} images of {len(self.paths)}")

    def write(self, path: Path) -> None:
        """Write ``path`` (CSV) and show the beginning."""
        table = Table(title=as_markup(f"{self.task} → {path}"), title_justify="left")
        for name in ("image", "class", "probability %"):
            table.add_column(name)
        # the bytes of file names that are not UTF-8 are written as they are
        with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            writer = csv.writer(stream)
            writer.writerow(["image", *(f"{what}_{n}" for n in range(1, self.top + 1) for what in ("class", "probability"))])
            for position, index in enumerate(sorted(self.rows)):
                row = self.rows[index]
                best = (item for name, value in row for item in (_cell(name), f"{value:.6f}"))
                writer.writerow([_cell(str(self.paths[index])), *best])
                if position < _SHOWN:
                    table.add_row(as_markup(self.paths[index].name), as_markup(row[0][0]), f"{100 * row[0][1]:.1f}")
        if len(self.rows) > _SHOWN:
            table.add_row("…", f"{len(self.rows) - _SHOWN} more in the file", "")
        show(table)


def _cell(text: str) -> str:
    """Text as a spreadsheet shows it: what it would take for a formula gets an apostrophe in front.

    So does what begins with an apostrophe itself: whoever removes the first one of each cell that has it has the text again.
    """
    return f"'{text}" if text.startswith(_FORMULA) else text
