"""The data module: what it reads and fetches, and each process's share of it."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from loading import Fetched, all_fetched, fetched, joined, process, whole_split
from tiny import SIZES, TASKS, encoded, picture, write_parquet
from torch.utils.data import DistributedSampler

from mergekit_vision.data.checks import Needs
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.data.pixel_cache import PixelCache
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.errors import InputError
from mergekit_vision.sources.folder import FlatFolder
from mergekit_vision.sources.opening import open_source


@pytest.mark.parametrize("name", ["batch_size", "num_workers", "cache_mb"])
def test_bad_arguments(name: str) -> None:
    with pytest.raises(InputError, match=name):
        VisionTasks("nowhere.yaml", **{name: -1})


def test_the_constructor_reads_nothing() -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        VisionTasks("nowhere.yaml").check(Needs())


def test_tasks_choose_what_is_evaluated(tiny_suite: Path) -> None:
    data = VisionTasks(str(tiny_suite), tasks=["stripes", "colors"])
    assert data.task_names == ("colors", "stripes")
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [41, 41]
    assert [len(loader.dataset) for loader in data.val_dataloader()] == [37, 37]
    assert data.size("grays", "val") == 37
    for tasks, hint in ((["strips"], "did you mean `stripes`"), ([], "an empty list")):
        with pytest.raises(InputError, match=hint):
            VisionTasks(str(tiny_suite), tasks=tasks).check(Needs())


@pytest.mark.parametrize(
    ("needs", "made"),
    [
        (Needs({"test"}), [("grays", "test")]),
        (Needs({"val"}), [("grays", "val")]),
        (Needs(), []),
        (Needs(everywhere={"val"}), [(task, "val") for task in TASKS]),
        (Needs(proxies=True), [(task, "val") for task in TASKS]),
        (Needs(proxies=True, merged={"colors", "stripes"}), [("colors", "val"), ("stripes", "val")]),
        (Needs(merged={"colors"}), []),
        (
            Needs({"test"}, everywhere={"train"}),
            [("colors", "train"), ("grays", "train"), ("grays", "test"), ("stripes", "train")],
        ),
    ],
)
def test_only_what_will_be_read_is_downloaded(root: Path, needs: Needs, made: list[tuple[str, str]]) -> None:
    data = VisionTasks(all_fetched(root), tasks=["grays"], allow_code=True)
    data.fetch(needs)
    assert Fetched.made == made
    data.fetch(needs)
    assert Fetched.made == made, "each once"


def test_nothing_is_downloaded_for_a_suite_at_fault(root: Path) -> None:
    path = all_fetched(root)
    (root / "experts" / "stripes.safetensors").unlink()
    data = VisionTasks(path, allow_code=True)
    with pytest.raises(InputError, match=r"1 fault\n  tasks\.stripes\.expert: .*No such file"):
        data.fetch(Needs({"test"}, everywhere={"val"}))
    assert Fetched.made == []
    data.fetch(Needs({"test"}, experts=False))  # a model merged before needs no experts
    assert Fetched.made == [(task, "test") for task in TASKS]


def test_out_of_domain_proxies_are_downloaded_once_and_for_merging_only(root: Path) -> None:
    data = VisionTasks(all_fetched(root), proxies=Proxies(source=fetched("elsewhere", "all")), allow_code=True)
    data.fetch(Needs(experts=False))
    assert Fetched.made == []
    data.fetch(Needs(proxies=True))
    data.check(Needs(proxies=True))
    assert Fetched.made == [("elsewhere", "all")]


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 0), (50, 0), (3, 2)])
def test_shards_hold_every_image_once(tiny_suite: Path, world: int, workers: int) -> None:
    data = VisionTasks(str(tiny_suite), batch_size=4, num_workers=workers)
    images, labels = whole_split(tiny_suite, "stripes", "test")
    shards = []
    for _ in range(2):  # the second pass comes from the cache, where each rank has its own
        shards = []
        for rank in range(world):
            data.trainer = process(world, rank)
            loader = data.loader("stripes", "test")
            assert isinstance(loader.sampler, DistributedSampler)
            batches = list(loader)
            assert len(batches) == len(loader)
            shards.append(joined(batches) if batches else (images[:0], labels[:0]))
    for rank, (pixels, classes) in enumerate(shards):
        assert torch.equal(pixels, images[rank::world])
        assert torch.equal(classes, labels[rank::world])
    assert sum(len(pixels) for pixels, _ in shards) == SIZES["test"]


class Count(LightningModule):
    """Writes what it saw of each task to one file a rank."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place
        self.seen: dict[int, list[tuple[float, int]]] = {}

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.setdefault(dataloader_idx, []).extend(zip(batch[0].sum((1, 2, 3)).tolist(), batch[1].tolist(), strict=True))

    def on_test_end(self) -> None:
        (self.place / str(self.global_rank)).write_bytes(pickle.dumps(self.seen))


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks")
@pytest.mark.filterwarnings("ignore")
def test_lightning_on_two_processes_sees_every_image_once(root: Path, tmp_path: Path) -> None:
    write_parquet(root / "data" / "grays" / "test.parquet", "grays", TASKS["grays"][0], 1, seed=0)  # fewer than processes
    data = VisionTasks(str(root / "suite.yaml"), batch_size=8)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.test(Count(tmp_path), datamodule=data, verbose=False)
    ranks = [pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2)]
    for number, task in enumerate(TASKS):
        images, labels = whole_split(root / "suite.yaml", task, "test")
        expected = sorted(zip(images.sum((1, 2, 3)).tolist(), labels.tolist(), strict=True))
        found = sorted(item for rank in ranks for item in rank.get(number, []))
        assert [label for _, label in found] == [label for _, label in expected]
        assert np.allclose([value for value, _ in found], [value for value, _ in expected])
    assert sum(len(rank.get(1, [])) for rank in ranks) == 1


QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Echo(LightningModule):
    def predict_step(self, batch: object, batch_idx: int) -> object:
        return batch


@pytest.mark.filterwarnings("ignore")
def test_predict_loader(tiny_suite: Path, tmp_path: Path) -> None:
    data = VisionTasks(str(tiny_suite), batch_size=2)
    source = open_source(data.suite.tasks["stripes"].data["val"])
    for index in range(3):
        source[index][0].save(tmp_path / f"{index}.png")
    assert data.predict_dataloader() == []
    data.predict_on(FlatFolder(tmp_path))
    images, indices = joined(Trainer(**QUIET).predict(Echo(), datamodule=data))
    assert torch.equal(images, whole_split(tiny_suite, "stripes", "val")[0][:3])
    assert indices.tolist() == [0, 1, 2]
    data.predict_on(None)
    assert data.predict_dataloader() == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_of_a_folder_stops_prediction_with_its_name_alone(tiny_suite: Path, tmp_path: Path, workers: int) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture("colors", 0, np.random.RandomState(0))))
    (tmp_path / "b.png").write_bytes(b"broken")
    data = VisionTasks(str(tiny_suite), num_workers=workers)
    data.predict_on(FlatFolder(tmp_path))
    with pytest.raises(InputError, match=rf"^{tmp_path}/b\.png: not a readable image") as caught:
        Trainer(**QUIET).predict(Echo(), datamodule=data)
    assert "Traceback" not in str(caught.value)


class Collect(Echo):
    def on_predict_end(self) -> None:
        (Path(self.trainer.default_root_dir) / str(self.global_rank)).touch()


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_without_images_predicts_nothing_and_does_not_hang(tiny_suite: Path, tmp_path: Path, workers: int) -> None:
    picture("grays", 0, np.random.RandomState(0)).save(tmp_path / "one.png")
    data = VisionTasks(str(tiny_suite), num_workers=workers)
    data.predict_on(FlatFolder(tmp_path / "one.png"))
    data.trainer = process(world=2, rank=1, devices=2)
    loader = data.predict_dataloader()
    assert (len(loader), list(loader)) == (0, [])
    data.trainer = None
    trainer = Trainer(devices=2, strategy="ddp_fork", default_root_dir=tmp_path, **QUIET)
    trainer.predict(Collect(), datamodule=data, return_predictions=False)


def test_the_cache_is_shared_by_the_processes_of_a_machine(tiny_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = VisionTasks(str(tiny_suite), cache_mb=1)
    data.trainer = process(devices=4)
    assert data.loader("grays", "test").cache.limit == (1 << 20) // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert VisionTasks(str(tiny_suite), cache_mb=1).loader("grays", "test").cache.limit == (1 << 20) // 2


@pytest.mark.parametrize("world", [1, 2])
def test_says_beforehand_what_will_stay_decoded(tiny_suite: Path, world: int) -> None:
    data = VisionTasks(str(tiny_suite))
    data.trainer = process(world=world, rank=world - 1, devices=1)
    tasks = data.task_names
    assert data.stays_decoded(tasks, "val")
    for task in tasks:
        list(data.loader(task, "val"))
    needed = data._cache.used
    for limit, fits in ((needed, True), (needed - 1, False)):
        data._cache = PixelCache(limit)
        assert data.stays_decoded(tasks, "val") is fits
        list(data.loader(tasks[0], "val"))
        assert data.stays_decoded(tasks[:1], "val"), "it is there"
        assert data.stays_decoded(tasks, "val") is fits


def test_zoo_loads(zoo: Path) -> None:
    data = VisionTasks(str(zoo / "suite.yaml"))
    data.check(Needs({"val", "test"}, proxies=True))
    assert next(iter(data.proxy_loader("gtsrb"))).shape == (32, 3, 32, 32)
    assert [data.size(task, "test") for task in ("mnist", "flowers5")] == [
        sum(len(labels) for _, labels in data.loader(task, "test")) for task in ("mnist", "flowers5")
    ]
