"""Images that are damaged, hostile or none at all: one line that names the file, and in no time."""

import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hostile.outcomes import outcome
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mergekit_vision.errors import InputError
from mergekit_vision.sources.decoding import decode
from mergekit_vision.sources.folder import FlatFolder

UNKNOWN = "not a readable image (of no known format, or empty); replace or remove it"


@cache
def picture(form: str, mode: str = "RGB") -> bytes:
    """A noisy image in a format."""
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 40, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    noise.convert(mode).save(buffer, form)
    return buffer.getvalue()


def saved(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def png(width: int, height: int, data: bytes = b"", extra: tuple[bytes, bytes] | None = None) -> bytes:
    """A gray PNG by its parts, whatever they say."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    chunks = [header, *([extra] if extra else []), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", UNKNOWN),
    "one byte": (lambda: b"\xff", UNKNOWN),
    "zeros": (lambda: bytes(1000), UNKNOWN),
    "text": (lambda: b"<html><body>404 Not Found</body></html>", UNKNOWN),
    "a pointer of Git LFS": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", UNKNOWN),
    "a script for Ghostscript": (lambda: picture("EPS"), UNKNOWN),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', UNKNOWN),
    "only a signature": (lambda: b"\x89PNG\r\n\x1a\n", "not a readable image"),
    "no width": (lambda: png(0, 10), "not a readable image"),
    "no height": (lambda: png(10, 0), "not a readable image"),
    "no pixels in a bitmap": (lambda: b"P6 0 0 255\n", "not a readable image"),
    "169 megapixels": (lambda: png(13_000, 13_000), "more than 89 megapixels; make it smaller"),
    "the largest size there is": (lambda: png(2**31 - 1, 2**31 - 1), "more than 89 megapixels; make it smaller"),
    "as wide as a page is high": (lambda: saved(Image.new("L", (100_000, 1))), "no side may be more than 1000 times the other"),
    "a thread": (lambda: saved(Image.new("L", (1, 100_000))), "no side may be more than 1000 times the other"),
    "a text of 100 MB": (
        lambda: png(4, 4, bytes(20), (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9))),
        "not a readable image",
    ),
    "too little data": (lambda: png(100, 100, bytes(50)), "not a readable image"),
    "floats above 1": (lambda: saved(Image.fromarray(np.full((4, 4), 200, np.float32)), "TIFF"), "must lie in 0 to 1"),
    "floats that are none": (lambda: saved(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "must lie in 0 to 1"),
    "large integers": (lambda: saved(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), "whose white is not known"),
    **{f"half a {form}": (lambda form=form: picture(form)[:-300], "not a readable image") for form in ("PNG", "JPEG", "TIFF")},
}


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_cannot_be_read_is_one_line(name: str, tmp_path: Path) -> None:
    made, fragment = IMAGES[name]
    (tmp_path / "x.png").write_bytes(made())
    for image in (made(), tmp_path / "x.png"):
        with pytest.raises(InputError) as caught:
            decode(image, "x.png, row 7")
        assert str(caught.value).startswith("x.png, row 7: ")
        assert fragment in str(caught.value)
        assert "\n" not in str(caught.value)
        assert " at 0x" not in str(caught.value)


def test_a_long_image_within_the_limit_is_read() -> None:
    assert decode(saved(Image.new("L", (1000, 1))), "x").size == (1000, 1)


def test_a_limit_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    large = saved(Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    with pytest.raises(InputError, match="megapixels"):
        decode(large, "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert decode(large, "x").size == (100, 100)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (Path.mkdir, "not a regular file"),
    "a FIFO": (os.mkfifo, "not a regular file"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "no such file"),
    "nothing": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_not_opened(name: str, tmp_path: Path) -> None:
    make, fragment = FILES[name]
    make(tmp_path / "x.png")
    with pytest.raises(InputError, match=f"x: not a readable image .{fragment}"):
        decode(tmp_path / "x.png", "x")


@pytest.mark.parametrize("name", ["\0.png", "x" * 5000 + ".png", "~nobody.png", "\udcff.png"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x: not a readable image"):
        decode(tmp_path / name, "x")


def test_a_name_that_is_not_utf_8_is_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"x\xe9.png")
    (tmp_path / name).write_bytes(picture("PNG"))
    folder = FlatFolder(tmp_path)
    assert [path.name for path in folder.paths] == [name]
    assert folder[0][0].size == (40, 40)
    assert len(folder.fingerprint()) == 64


@given(
    form=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "TGA", "DDS", "SGI", "PCX"]),
    cut=st.integers(0, 2000),
    flips=st.lists(st.tuples(st.integers(0, 1999), st.integers(1, 255)), max_size=5),
)
def test_a_damaged_image_is_an_image_or_an_input_error(form: str, cut: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(picture(form))
    for position, change in flips:
        data[position % len(data)] ^= change
    found, fault = outcome(lambda: decode(bytes(data[: len(data) - cut % len(data)]), "x"))
    if found is not None:
        assert found.mode == "RGB"
    else:
        assert re.fullmatch("x: .+", fault or "")
