import gc
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import SIZES, TASKS, encoded, picture
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, DistributedSampler

from mergekit_vision.data.datamodule import Proxies, VisionTasks
from mergekit_vision.data.loader import ExactSampler, decoding_processes
from mergekit_vision.data.preprocess import eval_transform
from mergekit_vision.encoders.backbone import describe_backbone
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.metric import TaskMetric
from mergekit_vision.sources.folder import FlatFolder
from mergekit_vision.sources.opening import open_source
from mergekit_vision.suites.suite import Suite


def whole_split(suite: Path, task: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference: open_clip's own transform on every image, in order."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    loaded = Suite.load(suite)
    transform = image_transform_v2(PreprocessCfg(**describe_backbone(loaded.backbone, None).preprocess), is_train=False)
    source = open_source(loaded.tasks[task].data[split])
    images, labels = zip(*(source[index] for index in range(len(source))), strict=True)
    return torch.stack([transform(image) for image in images]), torch.tensor(labels)


def joined(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_mb", [0, 2048])
def test_batches_are_open_clips_bit_by_bit_on_every_pass(tiny_suite: Path, workers: int, cache_mb: int):
    data = VisionTasks(str(tiny_suite), batch_size=8, num_workers=workers, cache_mb=cache_mb)
    images, labels = whole_split(tiny_suite, "grays", "test")
    for _ in range(3):
        loader = data.loader("grays", "test")
        assert isinstance(loader, DataLoader)
        assert (len(loader), len(loader.dataset)) == (6, 41)
        found = joined(loader)
        assert torch.equal(found[0], images)
        assert torch.equal(found[1], labels)
        assert (found[0].dtype, found[1].dtype) == (torch.float32, torch.int64)


def test_a_complete_pass_is_decoded_once_and_an_incomplete_one_again(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch):
    from mergekit_vision.sources.parquet import ParquetImages

    decoded = []
    read = ParquetImages.__getitem__
    monkeypatch.setattr(ParquetImages, "__getitem__", lambda self, index: decoded.append(index) or read(self, index))
    data = VisionTasks(str(tiny_suite), batch_size=8)
    next(iter(data.loader("grays", "test")))
    gc.collect()
    assert len(decoded) == 8
    decoded.clear()
    for _ in range(3):
        list(data.loader("grays", "test"))
    assert decoded == list(range(41))


def test_changing_a_batch_does_not_change_the_next_pass(tiny_suite: Path):
    data = VisionTasks(str(tiny_suite))
    first = joined(data.loader("colors", "val"))[0].clone()
    for images, labels in data.loader("colors", "val"):
        images.zero_()
        labels.zero_()
    images, labels = joined(data.loader("colors", "val"))
    assert torch.equal(images, first)
    assert torch.equal(labels, whole_split(tiny_suite, "colors", "val")[1])


def test_the_cache_keeps_within_its_limit(tiny_suite: Path):
    data = VisionTasks(str(tiny_suite), batch_size=8, cache_mb=1)
    data._cache.limit = 41 * 3 * 16 * 16 + 10  # one test split of uint8 pixels
    for task in TASKS:
        joined(data.loader(task, "test"))
    assert list(data._cache.passes) == [("colors", "test", 1, 0)]
    assert data._cache.used == 41 * 3 * 16 * 16


def test_what_does_not_fit_is_said_once(tiny_suite: Path, capsys: pytest.CaptureFixture[str]):
    data = VisionTasks(str(tiny_suite), batch_size=8, cache_mb=1)
    data._cache.limit = 41 * 3 * 16 * 16 + 10
    for _ in range(2):
        for task in TASKS:
            joined(data.loader(task, "test"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("grays test: 0 MiB of pixels do not fit into the 0 MiB left of --data.cache_mb")
    joined(VisionTasks(str(tiny_suite), cache_mb=0).loader("grays", "test"))
    assert not capsys.readouterr().out


def test_the_cache_keeps_nothing_in_the_shared_memory_of_workers(tiny_suite: Path):
    data = VisionTasks(str(tiny_suite), batch_size=8, num_workers=2)
    joined(data.loader("grays", "test"))
    (batches,) = data._cache.passes.values()
    assert len(batches) == 6
    assert not any(part.is_shared() for batch in batches for part in batch)


def test_normalizing_does_not_wait_for_the_device():
    finish = eval_transform({"size": 16, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}).to(torch.device("meta")).finish
    images = finish(torch.zeros(2, 3, 16, 16, dtype=torch.uint8, device="meta"))  # where whatever reads a value fails
    assert (images.shape, images.dtype) == ((2, 3, 16, 16), torch.float32)


def test_batches_come_on_the_trainers_device(tiny_suite: Path):
    data = VisionTasks(str(tiny_suite), batch_size=8)
    data.trainer = about_to("test", None)
    data.trainer.strategy = SimpleNamespace(root_device=torch.device("meta"))
    for _ in range(2):  # decoded, then from the cache, which stays on the host
        assert all(part.is_meta for batch in data.loader("grays", "test") for part in batch)
    assert all(images.is_meta for images in data.proxy_loader("grays"))
    assert not any(part.is_meta for batches in data._cache.passes.values() for batch in batches for part in batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_nothing_waits_and_the_batches_are_the_same(tiny_suite: Path):
    data = VisionTasks(str(tiny_suite), batch_size=8)
    expected = joined(data.loader("grays", "test"))
    data.trainer = about_to("test", None)
    data.trainer.strategy = SimpleNamespace(root_device=torch.device("cuda", 0))
    loader, metric = data.loader("grays", "test"), TaskMetric().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(loader)
        for images, labels in batches:
            metric.update(images[:, :, 0, 0], labels % 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(part.cpu(), whole) for part, whole in zip(joined(batches), expected, strict=True))


@pytest.mark.parametrize(
    ("images", "processes", "accelerated", "workers"),
    [
        (10_000, 1, True, 7),
        (10_000, 4, True, 1),
        (10_000, 8, True, 0),
        (600, 1, True, 2),
        (100, 1, True, 0),
        (10_000, 1, False, 0),
    ],
)
def test_as_many_workers_as_pay_off(monkeypatch, images: int, processes: int, accelerated: bool, workers: int):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    assert decoding_processes(images, 128, processes, accelerated) == workers


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 0), (50, 0), (3, 2)])
def test_shards_hold_every_image_once(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch, world: int, workers: int):
    data = VisionTasks(str(tiny_suite), batch_size=4, num_workers=workers)
    images, labels = whole_split(tiny_suite, "stripes", "test")
    shards = []
    for _ in range(2):  # the second pass comes from the cache, where each rank has its own
        shards = []
        for rank in range(world):
            monkeypatch.setattr(data, "_place", lambda rank=rank: (world, rank))
            loader = data.loader("stripes", "test")
            assert isinstance(loader.sampler, DistributedSampler)
            batches = list(loader)
            assert len(batches) == len(loader)
            shards.append(joined(batches) if batches else (images[:0], labels[:0]))
    for rank, (pixels, classes) in enumerate(shards):
        assert torch.equal(pixels, images[rank::world])
        assert torch.equal(classes, labels[rank::world])
    assert sum(len(pixels) for pixels, _ in shards) == SIZES["test"]


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 8, 9])
def test_sampler_covers_any_length(size: int, world: int):
    samplers = [ExactSampler(range(size), world, rank) for rank in range(world)]
    assert sorted(index for sampler in samplers for index in sampler) == list(range(size))
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)


class Count(LightningModule):
    """Writes what it saw of each task to one file a rank."""

    def __init__(self, place: Path):
        super().__init__()
        self.place, self.seen = place, {}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.seen.setdefault(dataloader_idx, []).extend(zip(batch[0].sum((1, 2, 3)).tolist(), batch[1].tolist(), strict=True))

    def on_test_end(self):
        (self.place / str(self.global_rank)).write_bytes(pickle.dumps(self.seen))


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="forks")
@pytest.mark.filterwarnings("ignore")
def test_lightning_on_two_processes_sees_every_image_once(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = VisionTasks(str(tiny_suite), batch_size=8)
    source = open_source(Suite.load(tiny_suite).tasks["grays"].data["test"])
    monkeypatch.setattr(type(source), "__len__", lambda self: 1 if "grays" in str(self._groups[0].path) else 41)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.test(Count(tmp_path), datamodule=data, verbose=False)
    ranks = [pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2)]
    for number, task in enumerate(TASKS):
        images, labels = whole_split(tiny_suite, task, "test")
        expected = sorted(zip(images.sum((1, 2, 3)).tolist(), labels.tolist(), strict=True))
        found = sorted(item for rank in ranks for item in rank.get(number, []))
        assert [label for _, label in found] == [label for _, label in expected]
        assert np.allclose([value for value, _ in found], [value for value, _ in expected])
    assert sum(len(rank.get(1, [])) for rank in ranks) == 1  # fewer images than processes


@pytest.mark.parametrize("label", [None, 1])
def test_proxies_are_the_documented_draw(tiny_suite: Path, label: int | None):
    images, labels = whole_split(tiny_suite, "colors", "val")
    pool = images if label is None else images[labels == label]
    chosen = np.random.RandomState(5).choice(len(pool), 6, replace=False)
    data = VisionTasks(str(tiny_suite), batch_size=4, proxies=Proxies(n=6, seed=5, label=label))
    for _ in range(2):
        batches = list(data.proxy_loader("colors"))
        assert [len(batch) for batch in batches] == [4, 2]
        assert torch.equal(torch.cat(batches), pool[np.sort(chosen)])


def test_every_process_gets_all_proxies(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch):
    data = VisionTasks(str(tiny_suite), proxies=Proxies(n=100, split="test"))
    monkeypatch.setattr(data, "_place", lambda: (2, 1))
    (images,) = data.proxy_loader("grays")
    everything = whole_split(tiny_suite, "grays", "test")[0]
    assert torch.equal(images.sum((1, 2, 3)).sort().values, everything.sum((1, 2, 3)).sort().values)


def test_proxies_from_another_data_set(tiny_suite: Path, tmp_path: Path):
    elsewhere = Proxies(n=5, source={"parquet": "data/stripes/val.parquet"})
    data = VisionTasks(str(tiny_suite), proxies=elsewhere)
    data.check(proxies=True)
    stripes = VisionTasks(str(tiny_suite), proxies=Proxies(n=5))
    for task in TASKS:
        assert torch.equal(next(iter(data.proxy_loader(task))), next(iter(stripes.proxy_loader("stripes"))))
    for number in range(4):
        picture("grays", number, np.random.RandomState(number)).save(tmp_path / f"{number}.png")
    unlabeled = VisionTasks(str(tiny_suite), proxies=Proxies(source={"folder": str(tmp_path)}))
    assert next(iter(unlabeled.proxy_loader("grays"))).shape == (4, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ({"n": 0}, "proxies.n must be 1 or more, not 0"),
        ({"seed": -1}, "proxies.seed"),
        ({"label": -2}, "proxies.label"),
        ({"source": {"foldr": "x"}}, "did you mean `folder`"),
    ],
)
def test_bad_proxies(arguments: dict[str, object], hint: str):
    with pytest.raises(InputError, match=hint):
        Proxies(**arguments)


def test_proxies_that_are_not_there(tiny_suite: Path):
    with pytest.raises(InputError, match=r"task stripes: proxies\.label: no image has the label 2"):
        VisionTasks(str(tiny_suite), proxies=Proxies(label=2)).check(proxies=True)
    with pytest.raises(InputError, match=r"1 fault\n  proxies\.split: no task has a split tset \(did you mean `test`\?\)"):
        VisionTasks(str(tiny_suite), proxies=Proxies(split="tset")).check({"val"}, proxies=True)


def test_tasks_choose_what_is_evaluated(tiny_suite: Path):
    data = VisionTasks(str(tiny_suite), tasks=["stripes", "colors"])
    assert data.task_names == ("colors", "stripes")
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [41, 41]
    assert [len(loader.dataset) for loader in data.val_dataloader()] == [37, 37]
    assert data.size("grays", "val") == 37
    for tasks, hint in ((["strips"], "did you mean `stripes`"), ([], "an empty list")):
        with pytest.raises(InputError, match=hint):
            VisionTasks(str(tiny_suite), tasks=tasks).check()


@pytest.mark.parametrize("name", ["batch_size", "num_workers", "cache_mb"])
def test_bad_arguments(name: str):
    with pytest.raises(InputError, match=name):
        VisionTasks("nowhere.yaml", **{name: -1})


def test_the_constructor_reads_nothing():
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        VisionTasks("nowhere.yaml").check()


def test_what_was_checked_is_not_checked_again(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(Suite, "faults", lambda self, shapes, splits, experts: calls.append((splits["grays"], experts)) or [])
    data = VisionTasks(str(tiny_suite))
    data.check({"test"}, experts=False)
    data.check({"test", "val"})
    data.check({"val"}, proxies=True)
    data.check()
    assert calls == [(["test"], False), (["val"], True)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_stops_with_its_name_alone(tiny_suite: Path, tmp_path: Path, workers: int):
    data = VisionTasks(str(tiny_suite), num_workers=workers)
    (tmp_path / "a.png").write_bytes(encoded(picture("colors", 0, np.random.RandomState(0))))
    (tmp_path / "b.png").write_bytes(b"broken")
    data.images = FlatFolder(tmp_path)
    data._sources["grays", "test"] = data.images
    for run in (lambda: list(data.loader("grays", "test")), lambda: Trainer(**QUIET).predict(Echo(), datamodule=data)):
        with pytest.raises(InputError, match=rf"^{tmp_path}/b\.png: not a readable image") as caught:
            run()
        assert "Traceback" not in str(caught.value)


QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Echo(LightningModule):
    def predict_step(self, batch, batch_idx):
        return batch


@pytest.mark.filterwarnings("ignore")
def test_predict_loader(tiny_suite: Path, tmp_path: Path):
    data = VisionTasks(str(tiny_suite), batch_size=2)
    source = open_source(data.suite.tasks["stripes"].data["val"])
    for index in range(3):
        source[index][0].save(tmp_path / f"{index}.png")
    assert data.predict_dataloader() == []
    data.images = FlatFolder(tmp_path)
    images, indices = joined(Trainer(**QUIET).predict(Echo(), datamodule=data))
    assert torch.equal(images, whole_split(tiny_suite, "stripes", "val")[0][:3])
    assert indices.tolist() == [0, 1, 2]


@pytest.fixture
def root(tiny_suite: Path, tmp_path: Path) -> Path:
    """A copy of the tiny suite that a test may spoil."""
    return Path(shutil.copytree(tiny_suite.parent, tmp_path / "suite"))


def changed(root: Path, change) -> str:
    """The suite file after ``change`` to its tasks."""
    content = yaml.safe_load((root / "suite.yaml").read_text())
    change(content["tasks"])
    (root / "suite.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(root / "suite.yaml")


class Fetched:
    """A data set that would be downloaded when it is made."""

    made: list[tuple[str, str]] = []  # noqa: RUF012

    def __init__(self, task: str, split: str, labels: list[int]):
        self.made.append((task, split))
        self.targets = labels

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return picture("colors", 0, np.random.RandomState(index)), self.targets[index]


def fetched(task: str, split: str, labels: tuple[int, ...] = (0, 1)) -> dict[str, object]:
    return {"torchvision": f"{__name__}.Fetched", "args": {"task": task, "split": split, "labels": list(labels)}}


def all_fetched(root: Path) -> str:
    Fetched.made.clear()

    def change(tasks):
        for name, task in tasks.items():
            task["data"] = {split: fetched(name, split) for split in ("train", "val", "test")}

    return changed(root, change)


CPU = SimpleNamespace(root_device=torch.device("cpu"))


def about_to(function: str | None, model: object, devices: int = 1) -> SimpleNamespace:
    """What the data module looks at in a trainer."""
    return SimpleNamespace(
        state=SimpleNamespace(fn=function), lightning_module=model, num_devices=devices, world_size=1, global_rank=0, strategy=CPU
    )


@pytest.mark.parametrize(
    ("function", "extra", "made"),
    [
        (TrainerFn.TESTING, set(), [("grays", "test")]),
        (TrainerFn.VALIDATING, set(), [("grays", "val")]),
        (TrainerFn.PREDICTING, set(), []),
        (TrainerFn.PREDICTING, {"val"}, [(task, "val") for task in TASKS]),
        (TrainerFn.TESTING, {"train"}, [("colors", "train"), ("grays", "train"), ("grays", "test"), ("stripes", "train")]),
    ],
)
def test_only_what_will_be_read_is_downloaded(root: Path, function: str, extra: set[str], made: list[tuple[str, str]]):
    data = VisionTasks(all_fetched(root), tasks=["grays"])
    data.trainer = about_to(function, SimpleNamespace(merger=object(), extra_splits=extra))
    data.prepare_data()
    assert Fetched.made == made
    assert data.splits_needed(function) == {split for _, split in made} - extra


def test_nothing_is_downloaded_for_a_suite_at_fault(root: Path):
    path = all_fetched(root)
    (root / "experts" / "stripes.safetensors").unlink()
    data = VisionTasks(path)
    data.trainer = about_to("test", SimpleNamespace(merger=object(), extra_splits={"val"}))
    with pytest.raises(InputError, match=r"1 fault\n  tasks\.stripes\.expert: .*No such file"):
        data.prepare_data()
    assert Fetched.made == []
    data.trainer = about_to("test", SimpleNamespace(merger=None))  # a model merged before needs no experts
    data.prepare_data()
    assert Fetched.made == [(task, "test") for task in TASKS]


def test_out_of_domain_proxies_are_downloaded_once_and_for_merging_only(root: Path):
    path = all_fetched(root)
    data = VisionTasks(path, proxies=Proxies(source=fetched("elsewhere", "all")))
    data.trainer = about_to("predict", SimpleNamespace(merger=None))
    data.prepare_data()
    assert Fetched.made == []
    data.trainer = about_to("predict", SimpleNamespace(merger=object()))
    data.prepare_data()
    data.check(proxies=True)
    assert Fetched.made == [("elsewhere", "all")]


@pytest.mark.parametrize(
    ("labels", "hint"),
    [((0, 3), "labels run from 0 to 3, but with 3 classes"), ((-1, 0), "labels run from -1 to 0"), ((), "holds no images")],
)
def test_what_was_downloaded_is_checked(root: Path, labels: tuple[int, ...], hint: str):
    path = changed(root, lambda tasks: tasks["colors"]["data"].update(test=fetched("colors", "test", labels)))
    data = VisionTasks(path)
    data.check({"test"})
    for use in (
        lambda: data.loader("colors", "test"),
        lambda: data.fingerprint("colors", "test"),
        lambda: data.test_dataloader(),
    ):
        with pytest.raises(InputError, match=rf"suite\.yaml: tasks\.colors\.data\.test: {hint}"):
            use()


def test_the_number_of_downloaded_classes_is_checked(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Fetched, "classes", ["a", "b"], raising=False)
    path = changed(root, lambda tasks: tasks["colors"]["data"].update(val=fetched("colors", "val")))
    with pytest.raises(InputError, match=r"tasks\.colors\.data\.val: the data has 2 classes, but there are 3 under `classes`"):
        VisionTasks(path).size("colors", "val")


def test_tasks_that_are_left_out_need_no_split_unless_every_task_does(root: Path):
    path = changed(
        root,
        lambda tasks: (
            [tasks["grays"]["data"].pop(split) for split in ("val", "test")]
            and tasks["grays"]["data"].update(train={"folder": "x"})
        ),
    )
    VisionTasks(path, tasks=["colors"]).check({"test"})
    with pytest.raises(InputError, match=r"1 fault\n  tasks\.grays\.data\.test: missing"):
        VisionTasks(path).check({"test"})
    with pytest.raises(InputError, match=r"1 fault\n  tasks\.grays\.data\.val: missing"):
        VisionTasks(path, tasks=["colors"]).check({"test"}, everywhere={"val"})


def test_tasks_without_the_default_proxy_split_are_refused_only_when_proxies_are_asked_for(root: Path):
    path = changed(root, lambda tasks: tasks["grays"]["data"].pop("val"))
    data = VisionTasks(path)
    data.check({"test"}, proxies=True)
    with pytest.raises(InputError, match=r"task grays has no split val; it has test"):
        data.proxy_loader("grays")
    path = changed(root, lambda tasks: tasks["stripes"]["data"].update(train=tasks["stripes"]["data"]["test"]))
    with pytest.raises(
        InputError, match=r"2 faults\n  tasks\.colors\.data\.train: missing.*\n  tasks\.grays\.data\.train: missing"
    ):
        VisionTasks(path, proxies=Proxies(split="train")).check(proxies=True)


def test_faults_of_the_suite_and_of_the_proxies_are_listed_together(root: Path):
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
            VisionTasks(path, proxies=proxies).check({"test"}, proxies=True)


def test_every_task_without_proxy_images_is_listed(tiny_suite: Path):
    with pytest.raises(InputError, match=r"2 faults\n  proxy images of task colors: .*\n  proxy images of task stripes: "):
        VisionTasks(str(tiny_suite), proxies=Proxies(label=3)).check(proxies=True)


def test_the_cache_is_shared_by_the_processes_of_a_machine(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch):
    data = VisionTasks(str(tiny_suite), cache_mb=1)
    data.trainer = about_to("test", None, devices=4)
    assert data.loader("grays", "test").cache.limit == (1 << 20) // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert VisionTasks(str(tiny_suite), cache_mb=1).loader("grays", "test").cache.limit == (1 << 20) // 2


def test_proxies_read_each_row_group_once(tiny_suite: Path):
    from mergekit_vision.sources.parquet import _images

    data = VisionTasks(str(tiny_suite), proxies=Proxies(n=30))  # of 37 images in three row groups, of which two are kept
    _images.cache_clear()
    list(data.proxy_loader("colors"))
    assert _images.cache_info().misses == 3


class Collect(Echo):
    def on_predict_end(self):
        (Path(self.trainer.default_root_dir) / str(self.global_rank)).touch()


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="forks")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_without_images_predicts_nothing_and_does_not_hang(tiny_suite: Path, tmp_path: Path, workers: int):
    picture("grays", 0, np.random.RandomState(0)).save(tmp_path / "one.png")
    data = VisionTasks(str(tiny_suite), num_workers=workers)
    data.images = FlatFolder(tmp_path / "one.png")
    data.trainer = SimpleNamespace(world_size=2, global_rank=1, num_devices=2, strategy=CPU)
    loader = data.predict_dataloader()
    assert (len(loader), list(loader)) == (0, [])
    data.trainer = None
    trainer = Trainer(devices=2, strategy="ddp_fork", default_root_dir=tmp_path, **QUIET)
    trainer.predict(Collect(), datamodule=data, return_predictions=False)


def test_zoo_loads(zoo: Path):
    data = VisionTasks(str(zoo / "suite.yaml"))
    data.check({"val", "test"}, proxies=True)
    assert next(iter(data.proxy_loader("gtsrb"))).shape == (32, 3, 32, 32)
    assert [data.size(task, "test") for task in ("mnist", "flowers5")] == [
        sum(len(labels) for _, labels in data.loader(task, "test")) for task in ("mnist", "flowers5")
    ]
