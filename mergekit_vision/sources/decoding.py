"""Encoded images of any kind as 8-bit RGB, and the limits of what is decoded."""

import io
import os
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mergekit_vision.errors import InputError
from mergekit_vision.support.faults import in_one_line
from mergekit_vision.support.memory import is_spent

LONGEST = 1000
"""How many times the other a side may be: the shorter one is resized to what the model sees, the longer along with it."""

_RUN_PROGRAMS = {"EPS"}  # Pillow has Ghostscript run what such a file says
_NOT_READ = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow recognizes, and leaves to others to read
_READ_AS_JPEG = "MPO"
_OF_16_BITS = {"PNG", "PPM"}  # formats of which Pillow gives 16 bits as 32, in some versions


def decode(image: bytes | Path, where: str) -> Image.Image:
    """Decode an encoded image, of several the first, to RGB as :func:`rgb` does. EXIF orientation is not applied.

    Args:
        image: the encoded image, or its file.
        where: file and row, for messages.

    Raises:
        InputError: naming ``where``, when the image is missing, damaged, too large or of an unknown format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(_openable(image), formats=_formats()) as opened:
                return rgb(opened)
    except UnidentifiedImageError as error:
        raise InputError(f"{where}: not a readable image (of no known format, or empty); replace or remove it") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{where}: {_limit()}; make it smaller or remove it") from error
    except Exception as error:  # what Pillow's readers raise for damaged files is not limited to any class
        if is_spent(error):
            raise
        raise InputError(f"{where}: not a readable image ({in_one_line(error)}); replace or remove it") from error


def named_by_data(name: str, directories: Iterable[Path], where: str) -> Path:
    """The file that a row of a data set names: data may come from strangers, and reads nothing but what lies beside it.

    Args:
        name: as it stands in the data; a relative one starts at the first directory.
        directories: where the file may be, by these names or with the links in them resolved. Links below them are followed,
            since data alone cannot make any.
        where: file and row, for messages.

    Raises:
        InputError: when it lies elsewhere, or is a URL.
    """
    if "://" in name:
        raise InputError(f"{where}: names the URL {name!r}, which is not fetched; store the images in the data")
    roots = [os.path.abspath(directory) for directory in directories]  # noqa: PTH100 (resolves no links)
    path = os.path.abspath(os.path.join(roots[0], name))  # noqa: PTH100, PTH118
    if not any(Path(path).is_relative_to(place) for root in roots for place in (root, os.path.realpath(root))):
        raise InputError(f"{where}: names the file {name!r}, which is not below {roots[0]}; store the images in the data")
    return Path(path)


def rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes as 8-bit RGB.

    Modes of 8 bits, palettes included, become what ``image.convert("RGB")`` makes of them, as in the training of CLIP models:
    transparency is dropped, not composited. There, white of 16 and 32 bits is cut off at 255; here 16 bits keep their high byte,
    as Pillow's readers do for colors of 16 bits, and floating-point numbers from 0 to 1 become 0 to 255.

    Raises:
        ValueError: when the image is too large or too long, or holds numbers of no known range.
    """
    _check_size(*image.size)
    if image.mode.startswith("I;16"):
        return _gray(np.asarray(image) >> 8)
    if image.mode == "I":
        return _gray(_of_16_bits(image) >> 8)
    if image.mode == "F":
        return _gray(np.rint(255 * _shares(image)))
    if image.mode == "La":  # of which Pillow knows no direct way
        image = image.convert("LA")
    return image.convert("RGB")


def _openable(image: bytes | Path) -> Path | io.BytesIO:
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if not image.is_file():  # opening a FIFO would wait forever
        raise ValueError("not a regular file" if image.exists() else "no such file")
    return image


def _check_size(width: int, height: int) -> None:
    short, long = sorted((width, height))
    if short == 0:
        raise ValueError("it has no pixels")
    if long > LONGEST * short:
        raise ValueError(f"{width} x {height} pixels: no side may be more than {LONGEST} times the other")
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels: {_limit()}")


def _limit() -> str:
    return f"more than {(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels"


def _of_16_bits(image: Image.Image) -> "np.ndarray[tuple[int, ...], np.dtype[np.int32]]":
    """The pixels of an image of 32-bit integers, which hold 16 bits; ``[H, W]``."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    # small numbers may be dark pixels of 16 bits or any of 8
    if low < 0 or high > 0xFFFF or (0 < high <= 0xFF and image.format not in _OF_16_BITS):
        raise ValueError(f"integers of 32 bits from {low} to {high}, whose white is not known; save it with 8 or 16 bits")
    return values


def _shares(image: Image.Image) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    """The pixels of an image of floating-point numbers in [0, 1]; ``[H, W]``."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 1:
        raise ValueError(f"floating-point numbers from {low:g} to {high:g}, but they must lie in 0 to 1; save it with 8 bits")
    return values


def _gray(values: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


@cache
def suffixes() -> frozenset[str]:
    """Suffixes of files that :func:`decode` reads, in lower case; Pillow has others too, of what it only writes or recognizes."""
    read = {*_formats(), _READ_AS_JPEG}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in read)


@cache
def _formats() -> tuple[str, ...]:
    """The formats that Pillow reads by itself, in its order."""
    Image.init()
    return tuple(name for name in Image.ID if name not in _RUN_PROGRAMS | _NOT_READ)
