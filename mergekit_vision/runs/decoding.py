"""How long images take to decode on this machine."""

import io
import time

import numpy as np
from PIL import Image

from mergekit_vision.data.preprocess import Preprocess
from mergekit_vision.merging.speed import BUDGET, Clock, seconds_of
from mergekit_vision.sources.base import ImageSource
from mergekit_vision.sources.decoding import decode

PHOTO = (500, 375)
"""Pixels of the photograph that stands for data that is not here."""
_MOST = 24  # images of a source that are decoded


def decoding_seconds(source: ImageSource | None, preprocess: Preprocess, clock: Clock = time.perf_counter) -> float:
    """Seconds to decode and resize one image of a source, or a photograph in its stead."""
    if source is None:
        encoded = _photo()
        return seconds_of(lambda: preprocess.geometry(decode(encoded, "photograph")), clock, BUDGET / 4)
    chosen = range(min(len(source), _MOST))
    preprocess.geometry(source[0][0])
    start = clock()
    for index in chosen:
        preprocess.geometry(source[index][0])
    return (clock() - start) / max(1, len(chosen))


def _photo() -> bytes:
    """A JPEG with the smooth and the rough of a photograph."""
    random, (width, height) = np.random.RandomState(0), PHOTO
    coarse = Image.fromarray(random.randint(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize(PHOTO)
    noise = random.randint(-8, 9, (height, width, 3))
    pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=90)
    return content.getvalue()
