"""Images of every kind as RGB: one rule for each of Pillow's modes."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mergekit_vision.errors import InputError
from mergekit_vision.sources.decoding import decode, named_by_data, rgb

RANDOM = np.random.RandomState(0)
COLORS = Image.fromarray(RANDOM.randint(0, 256, (6, 5, 3)).astype(np.uint8))
VEIL = Image.fromarray(RANDOM.randint(0, 256, (6, 5)).astype(np.uint8))
DEEP = RANDOM.randint(0, 1 << 16, (6, 5)).astype(np.uint16)


def transparent(mode: str) -> Image.Image:
    picture = COLORS.convert(mode)
    picture.putalpha(VEIL)
    return picture


def palette(transparency: bytes | None) -> Image.Image:
    picture = COLORS.convert("P")
    if transparency is not None:
        picture.info["transparency"] = transparency
    return picture


EIGHT_BITS = {
    "1": COLORS.convert("1"),
    "L": COLORS.convert("L"),
    "LA": transparent("LA"),
    "P": palette(None),
    "P with transparency": palette(bytes(256)),
    "PA": Image.merge("PA", [COLORS.convert("P"), VEIL]) if "PA" in Image.MODES else palette(None),
    "RGB": COLORS,
    "RGBA": transparent("RGBA"),
    "RGBa": transparent("RGBA").convert("RGBa"),
    "RGBX": COLORS.convert("RGBX"),
    "CMYK": COLORS.convert("CMYK"),
    "YCbCr": COLORS.convert("YCbCr"),
    "HSV": COLORS.convert("HSV"),
}
OTHERS = {"La", "LAB", "I", "I;16", "I;16L", "I;16B", "I;16N", "F"}


def deep(mode: str) -> Image.Image:
    """An image of 16 bits in any byte order."""
    picture = Image.new(mode, (5, 6))
    for y, x in np.ndindex(DEEP.shape):
        picture.putpixel((x, y), int(DEEP[y, x]))
    return picture


def gray(image: Image.Image) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    """The one channel of a gray RGB image."""
    pixels = np.asarray(image)
    assert image.mode == "RGB"
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def test_every_mode_is_tested() -> None:
    assert set(Image.MODES) - {"BGR;15", "BGR;16", "BGR;24"} <= {name.split()[0] for name in EIGHT_BITS} | OTHERS


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", EIGHT_BITS)
def test_eight_bits_are_what_convert_makes_of_them(mode: str) -> None:
    found = rgb(EIGHT_BITS[mode])
    assert (found.mode, found.size) == ("RGB", (5, 6))
    assert np.array_equal(np.asarray(found), np.asarray(EIGHT_BITS[mode].convert("RGB")))


def test_transparency_is_dropped() -> None:
    assert np.array_equal(np.asarray(rgb(transparent("RGBA"))), np.asarray(COLORS))
    assert np.array_equal(gray(rgb(transparent("LA"))), np.asarray(COLORS.convert("L")))


def test_premultiplied_gray_is_divided_by_its_alpha() -> None:
    picture = Image.merge("LA", [COLORS.convert("L"), Image.new("L", (5, 6), 200)])
    difference = gray(rgb(picture.convert("La"))).astype(int) - np.asarray(COLORS.convert("L"))
    assert abs(difference).max() <= 1, "a rounding to 200 levels and one back"


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bits_keep_the_high_byte(mode: str) -> None:
    assert np.array_equal(gray(rgb(deep(mode))), DEEP // 256)


@pytest.mark.parametrize("factor", [256, 257])
def test_eight_bits_widened_to_sixteen_come_back(factor: int) -> None:
    """By a shift or by scaling white to white: both are in use."""
    narrow = np.arange(256, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(gray(rgb(Image.fromarray(narrow * factor))), narrow)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_a_file_of_sixteen_bits(form: str) -> None:
    buffer = io.BytesIO()
    image = Image.fromarray(DEEP)
    image = image.convert("I") if form == "PPM" else image  # which older versions of Pillow need for 16 bits
    image.save(buffer, form)
    assert np.array_equal(gray(decode(buffer.getvalue(), "x")), DEEP // 256)


def test_a_dark_file_of_sixteen_bits_is_dark() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 255, np.uint16)).save(buffer, "PNG")
    assert gray(decode(buffer.getvalue(), "x")).max() == 0


def test_integers_of_32_bits_hold_16() -> None:
    assert np.array_equal(gray(rgb(Image.fromarray(DEEP.astype(np.int32)))), DEEP // 256)
    assert gray(rgb(Image.fromarray(np.zeros((4, 4), np.int32)))).max() == 0


@pytest.mark.parametrize("values", [[[-1, 5000]], [[0, 65536]], [[0, 255]]])
def test_integers_of_unknown_white_are_refused(values: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="whose white is not known; save it with 8 or 16 bits"):
        rgb(Image.fromarray(np.array(values, np.int32)))


def test_floating_point_numbers_run_from_0_to_1() -> None:
    shares = np.arange(256, dtype=np.float32).reshape(16, 16) / 255
    assert np.array_equal(gray(rgb(Image.fromarray(shares))), np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("value", [1.01, -0.01, 255.0, float("nan"), float("inf")])
def test_other_floating_point_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="must lie in 0 to 1"):
        rgb(Image.fromarray(np.array([[0.5, value]], np.float32)))


def test_lab_is_seen_in_srgb() -> None:
    from PIL import ImageCms

    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    picture = ImageCms.profileToProfile(Image.new("RGB", (4, 4), (200, 120, 60)), *profiles, outputMode="LAB")
    assert picture is not None
    difference = np.asarray(rgb(picture)).astype(int) - [200, 120, 60]
    assert abs(difference).max() <= 2, "8 bits of L, a and b are coarser than those of R, G and B"


def test_exif_orientation_is_not_applied() -> None:
    """As torchvision's data sets and open_clip read images."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    COLORS.save(buffer, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(buffer.getvalue(), "x")), np.asarray(COLORS))


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_of_several_images_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    buffer = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], **options)
    assert decode(buffer.getvalue(), "x").getpixel((0, 0)) == (255, 0, 0)


def test_a_cmyk_jpeg_has_its_colors() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 120, 60)).convert("CMYK").save(buffer, "JPEG", quality=100)
    difference = np.asarray(decode(buffer.getvalue(), "x")).astype(int) - [200, 120, 60]
    assert abs(difference).max() <= 3, "JPEG rounds"


def test_a_suffix_says_nothing(tmp_path: Path) -> None:
    COLORS.save(tmp_path / "x.bmp")
    (tmp_path / "x.bmp").rename(tmp_path / "x.jpg")
    assert np.array_equal(np.asarray(decode(tmp_path / "x.jpg", "x.jpg")), np.asarray(COLORS))


def test_files_named_by_data_lie_beside_it(tmp_path: Path) -> None:
    here, other = tmp_path / "here", tmp_path / "other"
    assert named_by_data("a/../b.png", [here], "row 1") == here / "b.png"
    assert named_by_data(str(other / "c.png"), [here, other], "row 1") == other / "c.png"
    for name in ("../other/c.png", "/etc/passwd", f"{here}-secret/x.png", "a/../../x.png"):
        with pytest.raises(InputError, match=r"row 1: names the file .* not below .*here; store the images in the data"):
            named_by_data(name, [here], "row 1")
    (tmp_path / "link").symlink_to(here)
    assert named_by_data("b.png", [tmp_path / "link"], "row 1") == tmp_path / "link" / "b.png"
    assert named_by_data(str(here / "b.png"), [tmp_path / "link"], "row 1") == here / "b.png"
    for name in ("../b.png", str(here.parent / "b.png")):
        with pytest.raises(InputError, match=r"row 1: names the file .* not below .*link; store the images in the data"):
            named_by_data(name, [tmp_path / "link"], "row 1")
    for name in ("http://example.com/x.png", "file:///etc/passwd", "hf://datasets/x/y.png", "zip://x.png::http://a.b/c.zip"):
        with pytest.raises(InputError, match=r"row 1: names the URL .* not fetched"):
            named_by_data(name, [here], "row 1")
