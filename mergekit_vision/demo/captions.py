"""Captioned pictures to pre-train on: the same concepts as the tasks, drawn cleaner and in other ways, with varied texts."""

from random import Random

from PIL import Image

from mergekit_vision.demo.concepts import CONCEPTS
from mergekit_vision.demo.drawing import Canvas

HARDEST = 0.5
"""Difficulty of the hardest picture; the tasks' pictures have 1."""


def captioned(seed: int, index: int) -> tuple[Image.Image, str, str]:
    """One picture, its caption and what that means, a function of seed and index alone.

    Captions of the same meaning, a class or its colors, are worded in several ways.

    >>> captioned(0, 4)[1:]
    ('a group of seven', 'counting: seven')
    """
    random = Random(f"captions/{seed}/{index}")
    name, concept = list(CONCEPTS.items())[int(len(CONCEPTS) * random.random())]
    canvas = Canvas(random, HARDEST * random.random(), concept.turn)
    label = canvas.choice(len(concept.classes))
    concept.paint(canvas, label)
    if concept.colored and not canvas.choice(8):
        caption = f"something {canvas.ink} on {canvas.paper}"
        return canvas.finish(), caption, caption
    caption = concept.captions[canvas.choice(len(concept.captions))].format(concept.classes[label])
    return canvas.finish(), caption, f"{name}: {concept.classes[label]}"
