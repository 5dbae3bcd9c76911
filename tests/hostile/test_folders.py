"""Folders of images with what people and programs leave in them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from pictures import image, numbered

from mergekit_vision.errors import InputError
from mergekit_vision.sources.checks import check_source
from mergekit_vision.sources.folder import FlatFolder, FolderImages
from mergekit_vision.sources.opening import open_source


def remove_images(folder: Path) -> None:
    for path in (folder / "ant").iterdir():
        path.unlink()


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a class without images": (lambda folder: (folder / "bee").mkdir(), "bee: holds no images"),
    "a class of other files": (
        lambda folder: [remove_images(folder), (folder / "ant" / "1.gif").write_bytes(b"")],
        r"ant: holds no images \(known by \.jpg, ",
    ),
    "a link to the folder": (lambda folder: (folder / "cat" / "up").symlink_to(folder), "cat/up/cat: a link to a directory"),
    "a link to the class": (
        lambda folder: (folder / "cat" / "all").symlink_to("."),
        "cat/all: a link to a directory",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_cannot_be_used_is_one_line(name: str, folder: Path) -> None:
    spoil, fragment = REFUSED[name]
    spoil(folder)
    with pytest.raises(InputError, match=fragment) as caught:
        FolderImages(folder)
    assert "\n" not in str(caught.value)
    assert check_source({"folder": str(folder)}, numbered(2)) == [str(caught.value)]


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a FIFO": (os.mkfifo, "not a regular file"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a link to nowhere": (lambda path: path.symlink_to("nowhere"), "no such file"),
    "an empty file": (Path.touch, "of no known format, or empty"),
    "text": (lambda path: path.write_text("not an image"), "of no known format"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_image_that_is_none_is_named(name: str, folder: Path) -> None:
    make, fragment = UNREADABLE[name]
    make(folder / "cat" / "0.png")
    with pytest.raises(InputError, match=f"cat/0.png: not a readable image .{fragment}"):
        FolderImages(folder)[1]


def test_a_link_out_of_the_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    """It is the user's own disk."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    image(7).save(tmp_path / "elsewhere" / "deep" / "x.png")
    (folder / "bee").symlink_to(tmp_path / "elsewhere")
    source = FolderImages(folder)
    assert source.names == ("ant", "bee", "cat")
    assert source[1][0].getpixel((0, 0)) == (7, 14, 100)


def test_what_is_hidden_is_left_out(folder: Path) -> None:
    before = FolderImages(folder).fingerprint()
    (folder / ".git").mkdir()
    (folder / ".DS_Store").touch()
    (folder / "cat" / "._1.png").write_bytes(b"\0\5\x16\7")
    (folder / "cat" / ".thumbnails").mkdir()
    image(1).save(folder / "cat" / ".thumbnails" / "1.png")
    assert FolderImages(folder).fingerprint() == before
    assert [path.name for path in FlatFolder(folder / "cat").paths] == ["1.png", "2.png"]


def test_files_that_are_no_images_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "cat" / "Thumbs.db").touch()
    (folder / "cat" / "notes.txt").touch()
    with caplog.at_level("INFO", logger="mergekit_vision"):
        assert len(FolderImages(folder)) == 3
    (said,) = [record.getMessage() for record in caplog.records]
    assert "cat: 2 files are left out" in said
    assert "cat/Thumbs.db" in said


def test_a_directory_without_permission_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not left out without a word."""

    def refuse(path: object) -> NoReturn:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    for source in (FolderImages, FlatFolder):
        with pytest.raises(InputError, match=r"photos: cannot be read \(Permission denied\); give permission"):
            source(folder)
    with pytest.raises(InputError, match="photos: cannot be read"):
        open_source({"folder": str(folder)}, labeled=False)


def test_a_fingerprint_of_what_is_gone_is_an_input_error(folder: Path) -> None:
    source = FolderImages(folder)
    (folder / "cat" / "1.png").unlink()
    with pytest.raises(InputError, match=r"cat/1\.png: cannot be read \(No such file"):
        source.fingerprint()


def test_images_below_a_class_are_ordered_as_torchvision_orders_them(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for name in (
        "b/x.png",
        "b/x-1/y.JPG",
        "b/x/z.png",
        "b/x/a/q.png",
        "b/x b/q.webp",
        "a/1.bmp",
        "a/10.tif",
        "a/2.png",
        "a/n.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    theirs, ours = ImageFolder(str(tmp_path)), FolderImages(tmp_path)
    assert list(ours.labels()) == theirs.targets
    assert ours.names == tuple(theirs.classes)
    for index, (path, _) in enumerate(theirs.samples):
        with pytest.raises(InputError, match=path):
            ours[index]
