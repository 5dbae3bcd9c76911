"""The images of a suite: opened once, and checked once they are there."""

from pathlib import Path

import pytest
from loading import Fetched, changed, fetched
from pictures import image
from tiny import write_file

from mergekit_vision.data.checks import Needs
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.images import SuiteImages
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.errors import InputError
from mergekit_vision.sources.folder import FolderImages
from mergekit_vision.suites.suite import Suite


@pytest.mark.parametrize(
    ("labels", "hint"),
    [((0, 3), "labels run from 0 to 3, but with 3 classes"), ((-1, 0), "labels run from -1 to 0"), ((), "holds no images")],
)
def test_what_was_downloaded_is_checked(root: Path, labels: tuple[int, ...], hint: str) -> None:
    path = changed(root, lambda tasks: tasks["colors"]["data"].update(test=fetched("colors", "test", labels)))
    data = VisionTasks(path, allow_code=True)
    data.check(Needs({"test"}))
    for use in (
        lambda: data.loader("colors", "test"),
        lambda: data.fingerprint("colors", "test"),
        lambda: data.test_dataloader(),
    ):
        with pytest.raises(InputError, match=rf"suite\.yaml: tasks\.colors\.data\.test: {hint}"):
            use()


def test_the_number_of_downloaded_classes_is_checked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fetched, "classes", ["a", "b"], raising=False)
    path = changed(root, lambda tasks: tasks["colors"]["data"].update(val=fetched("colors", "val")))
    with pytest.raises(InputError, match=r"tasks\.colors\.data\.val: the data has 2 classes, but there are 3 under `classes`"):
        VisionTasks(path, allow_code=True).size("colors", "val")


def test_a_split_is_opened_once(tiny_suite: Path) -> None:
    suite = Suite.load(tiny_suite)
    images = SuiteImages(suite, Proxies(n=5))
    split = images.split("grays", "val")
    assert images.split("grays", "val") is split
    source, indices = images.proxy_images("grays")
    assert source is split
    assert len(indices) == 5
    with pytest.raises(InputError, match=r"suite\.yaml: task grays has no split vla \(did you mean `val`\?\); it has val, test"):
        images.split("grays", "vla")


def test_one_source_elsewhere_serves_all_tasks(tiny_suite: Path) -> None:
    images = SuiteImages(Suite.load(tiny_suite), Proxies(n=5, source={"parquet": "data/stripes/val.parquet"}))
    drawn = [images.proxy_images(task) for task in images.suite.tasks]
    assert len({id(source) for source, _ in drawn}) == 1
    assert drawn[0] == drawn[1] == drawn[2]
    nowhere = SuiteImages(images.suite, Proxies(source={"folder": "nowhere"}))
    with pytest.raises(InputError, match=r"^proxies\.source: .*nowhere: not an image folder"):
        nowhere.proxy_images("grays")


def test_paths_beside_a_published_suite_start_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for directory, suite in ((tmp_path, "tall/ViT-B-32-8"), (tmp_path / "own", str(tmp_path / "own" / "suite.yaml"))):
        (directory / "photos" / "cat").mkdir(parents=True)
        image(1).save(directory / "photos" / "cat" / "1.png")
        write_file(directory, {"extends": "tall/ViT-B-32-8"})
        monkeypatch.chdir(tmp_path)
        source = SuiteImages(Suite.load(suite), Proxies(source={"folder": "photos"})).elsewhere()
        assert source.fingerprint() == FolderImages(directory / "photos").fingerprint()
