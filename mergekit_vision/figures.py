"""Pictures of results."""

from collections.abc import Mapping
from pathlib import Path

from mergekit_vision.files import replacing


def draw_routing(shares: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Heat map of how often images pick their own task's expert: tasks by routed layers, in %.

    Args:
        shares: layer -> task -> share in [0, 1].
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    layers, tasks = list(shares), list(next(iter(shares.values())))
    values = [[100 * shares[layer][task] for layer in layers] for task in tasks]
    figure = Figure(figsize=(2.5 + 0.5 * len(layers), 1.8 + 0.4 * len(tasks)), layout="constrained")
    axes = figure.add_subplot(title="Images that pick their own task's expert, %")
    picture = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xticks(range(len(layers)), [_short(layer) for layer in layers], rotation=60, ha="right", rotation_mode="anchor")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            shade = "black" if value > 60 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade, fontsize=7)
    figure.colorbar(picture, ax=axes, fraction=0.03)
    with replacing(path) as draft:
        figure.savefig(draft, dpi=150)


def _short(layer: str) -> str:
    """A layer's block and kind.

    >>> _short("visual.transformer.resblocks.3.mlp.c_fc")
    '3 c_fc'
    """
    parts = layer.split(".")
    return f"{parts[3]} {parts[-1]}" if len(parts) > 4 else layer
