"""Sizes of a vision tower, as the shapes of its parameters tell them."""

import math
import re
from collections.abc import Mapping

_BLOCK = re.compile(r"visual\.transformer\.resblocks\.(\d{1,4})\.")


def tower_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Sizes of a tower; of an adapter's, the layers alone can be told.

    >>> shapes = {"visual.conv1.weight": (768, 3, 32, 32), "visual.positional_embedding": (50, 768), "visual.proj": (768, 512)}
    >>> tower_sizes(shapes)
    {'width': 768, 'patch size': 32, 'image size': 224, 'embedding': 512}
    """
    found: dict[str, int] = {}
    if len(patch := shapes.get("visual.conv1.weight", ())) == 4:
        found |= {"width": patch[0], "patch size": patch[2]}
    if "patch size" in found and (positions := shapes.get("visual.positional_embedding")):
        found["image size"] = math.isqrt(max(positions[0] - 1, 0)) * patch[2]
    if len(projection := shapes.get("visual.proj", ())) == 2:
        found["embedding"] = projection[1]
    blocks = {int(block[1]) for key in shapes if (block := _BLOCK.match(key))}
    return {**found, **({"layers": max(blocks) + 1} if blocks else {})}
