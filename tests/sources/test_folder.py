"""Directories of images, labeled and not."""

from pathlib import Path

import pytest
from pictures import image, numbered

from mergekit_vision.errors import InputError
from mergekit_vision.sources.checks import check_source
from mergekit_vision.sources.folder import FlatFolder
from mergekit_vision.sources.opening import open_source


def test_image_folder(folder: Path) -> None:
    source = open_source({"folder": str(folder)})
    assert (source.names, list(source.labels()), len(source)) == (("ant", "cat"), [0, 1, 1], 3)
    assert source[2][0].mode == "RGB"
    assert check_source({"folder": str(folder)}, numbered(2)) == []
    assert check_source({"folder": str(folder)}, numbered(3)) == ["the data has 2 classes, but there are 3 under `classes`"]
    (folder / "cat" / "2.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"cat/2\.png: not a readable image"):
        source[2]
    with pytest.raises(InputError, match="nowhere: not an image folder"):
        open_source({"folder": str(folder / "nowhere")})


def test_a_flat_folder_is_of_files_that_can_be_opened(tmp_path: Path) -> None:
    names = ["x.bmp", "x.gif", "x.jfif", "x.JPEG", "x.mpo", "x.pdf", "x.png", "x.tif", "x.webp"]
    for name in names:
        image(1).save(tmp_path / name)
    others = {
        "x.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 3\n%%EndComments\n%%EOF\n",
        "x.grib": b"GRIB\0\0\0\x01",
        "x.h5": b"\x89HDF\r\n\x1a\n",
        "x.mpg": b"\0\0\x01\xb3\x01\0\x10\0",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    source = FlatFolder(tmp_path)
    assert {path.name for path in source.paths} == set(names) - {"x.pdf"}
    assert [source[index][0].size for index in range(len(source))] == [(4, 3)] * len(source)
    for name in ("x.pdf", *others):
        with pytest.raises(InputError, match=f"{name}: holds no image files"):
            FlatFolder(tmp_path / name)


def test_flat_folder(folder: Path) -> None:
    (folder / "cat" / "notes.txt").write_text("")
    source = FlatFolder(folder / "cat")
    assert [path.name for path in source.paths] == ["1.png", "2.png"]
    assert [source[index][1] for index in range(len(source))] == [0, 1]
    assert source[0][0].mode == "RGB"
    assert FlatFolder(folder / "cat" / "2.png").paths == (folder / "cat" / "2.png",)
    assert isinstance(open_source({"folder": str(folder / "cat")}, labeled=False), FlatFolder)
    for place, problem in {
        folder: "holds no image files.*; sub-directories are not searched",
        folder / "none": "no such file",
    }.items():
        with pytest.raises(InputError, match=f"{place}: {problem}"):
            FlatFolder(place)
