"""What is found before anything heavy starts, and that it is looked for once."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from loading import changed

import mergekit_vision.checkpoints
from mergekit_vision.data.checks import Needs
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.errors import InputError


def test_what_was_checked_is_not_checked_again(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the files that are opened: each check opens what the earlier ones have not seen."""
    opened: set[str] = set()
    parquet, expert = pq.ParquetFile.__init__, mergekit_vision.checkpoints.open_expert

    def counting(self: pq.ParquetFile, path: Path, *arguments: Any, **options: Any) -> None:
        opened.add(Path(path).name)
        parquet(self, path, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "__init__", counting)
    monkeypatch.setattr("mergekit_vision.suites.suite.open_expert", lambda at: opened.add(at.path.name) or expert(at))
    data, experts = VisionTasks(str(tiny_suite)), {"colors.safetensors", "grays.pt", "stripes.safetensors"}
    for needs, expected in (
        (Needs({"test"}, experts=False), {"test.parquet"}),
        (Needs({"test"}, experts=False), set()),
        (Needs({"test", "val"}), {"val.parquet", *experts}),
        (Needs({"val"}, proxies=True), {"val.parquet"}),  # whose images are now drawn
        (Needs({"val"}, proxies=True), set()),
        (Needs(), set()),
    ):
        opened.clear()
        data.check(needs)
        assert opened == expected, needs


def test_proxies_that_are_not_there(tiny_suite: Path) -> None:
    with pytest.raises(InputError, match=r"task stripes: proxies\.label: no image has the label 2"):
        VisionTasks(str(tiny_suite), proxies=Proxies(label=2)).check(Needs(proxies=True))
    with pytest.raises(InputError, match=r"1 fault\n  proxies\.split: no task has a split tset \(did you mean `test`\?\)"):
        VisionTasks(str(tiny_suite), proxies=Proxies(split="tset")).check(Needs({"val"}, proxies=True, judged=None))


def test_tasks_that_are_left_out_need_no_split_unless_every_task_does(root: Path) -> None:
    path = changed(
        root,
        lambda tasks: (
            [tasks["grays"]["data"].pop(split) for split in ("val", "test")]
            and tasks["grays"]["data"].update(train={"folder": "x"})
        ),
    )
    VisionTasks(path, tasks=["colors"]).check(Needs({"test"}))
    with pytest.raises(InputError, match=r"1 fault\n  tasks\.grays\.data\.test: missing"):
        VisionTasks(path).check(Needs({"test"}))
    with pytest.raises(InputError, match=r"1 fault\n  tasks\.grays\.data\.val: missing"):
        VisionTasks(path, tasks=["colors"]).check(Needs({"test"}, everywhere={"val"}))


def test_tasks_without_the_default_proxy_split_are_refused_only_when_proxies_are_asked_for(root: Path) -> None:
    path = changed(root, lambda tasks: tasks["grays"]["data"].pop("val"))
    data = VisionTasks(path)
    data.check(Needs({"test"}, proxies=True))
    with pytest.raises(InputError, match=r"task grays has no split val; it has test"):
        data.proxy_loader("grays")
    path = changed(root, lambda tasks: tasks["stripes"]["data"].update(train=tasks["stripes"]["data"]["test"]))
    with pytest.raises(
        InputError, match=r"2 faults\n  tasks\.colors\.data\.train: missing.*\n  tasks\.grays\.data\.train: missing"
    ):
        VisionTasks(path, proxies=Proxies(split="train")).check(Needs(proxies=True))


@pytest.mark.parametrize("split", ["val", "train"])
def test_images_of_tasks_that_are_not_merged_are_not_looked_at(root: Path, split: str) -> None:
    def rename(tasks: dict[str, Any]) -> None:
        for task in tasks.values():
            task["data"][split] = task["data"].pop("val")

    path = changed(root, rename)
    (root / "data" / "grays" / "val.parquet").unlink()
    some, every = Needs(proxies=True, merged={"colors", "stripes"}), Needs(proxies=True)
    VisionTasks(path, proxies=Proxies(split=split)).check(some)
    with pytest.raises(InputError, match=rf"1 fault\n  tasks\.grays\.data\.{split}: .*[Nn]o such file"):
        VisionTasks(path, proxies=Proxies(split=split)).check(every)
    VisionTasks(path, proxies=Proxies(split=split)).check(Needs())
    path = changed(root, lambda tasks: tasks["grays"]["data"].pop(split))
    for needs in (some, Needs(proxies=True, merged={"colors", "stripes"}, judged=None)):
        VisionTasks(path, proxies=Proxies(split=split)).check(needs)
    with pytest.raises(InputError, match=rf"1 fault\n  tasks\.grays\.data\.{split}: missing"):
        VisionTasks(path, proxies=Proxies(split=split)).check(Needs(proxies=True, judged=None))


def test_faults_of_the_suite_and_of_the_proxies_are_listed_together(root: Path) -> None:
    path = changed(root, lambda tasks: [task["data"].pop("val") for task in tasks.values()])
    (root / "experts" / "stripes.safetensors").unlink()
    (root / "data" / "grays" / "test.parquet").unlink()
    for proxies, last in (
        (Proxies(source={"folder": "nowhere"}), r"proxies\.source: .*nowhere: not an image folder"),
        (Proxies(split="tests"), r"proxies\.split: no task has a split tests \(did you mean `test`\?\); they have test"),
    ):
        with pytest.raises(
            InputError, match=rf"3 faults\n  tasks\.grays\.data\.test: .*\n  tasks\.stripes\.expert: .*\n  {last}"
        ):
            VisionTasks(path, proxies=proxies).check(Needs({"test"}, proxies=True))


def test_every_task_without_proxy_images_is_listed(tiny_suite: Path) -> None:
    with pytest.raises(InputError, match=r"2 faults\n  proxy images of task colors: .*\n  proxy images of task stripes: "):
        VisionTasks(str(tiny_suite), proxies=Proxies(label=3)).check(Needs(proxies=True))
