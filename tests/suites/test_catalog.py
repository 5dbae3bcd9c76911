"""The published suites: their texts against the notes they are from, and against hashes where those are not at hand."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from suite_notes import notes, texts_of

from mergekit_vision.errors import InputError
from mergekit_vision.sources.config import config_faults
from mergekit_vision.suites.catalog import PublishedSuite, published
from mergekit_vision.suites.layout import locate
from mergekit_vision.suites.suite import Suite

FAMILIES = ("fusion_bench", "tall")

HASHES: dict[str, dict[str, str]] = {
    "fusion_bench": {
        "sun397": "19b4780d8a38",
        "stanford_cars": "0d22bd2df28f",
        "resisc45": "3642784ea2c9",
        "eurosat": "06ba55474f15",
        "svhn": "2886561c388e",
        "gtsrb": "b90ab45ae000",
        "mnist": "2886561c388e",
        "dtd": "e9ba80ec3b0c",
        "oxford_flowers102": "5b7211584a8f",
        "pcam": "39c58d87bca4",
        "fer2013": "c6edc066992a",
        "oxford-iiit-pet": "5858bf0dbe1a",
        "stl10": "46a16cf8f0dd",
        "cifar100": "ba9674e7989f",
        "cifar10": "8fd45ee96f83",
        "food101": "7e638cafebbb",
        "fashion_mnist": "4b4aa0544632",
        "emnist_letters": "0a38a47cb23e",
        "kmnist": "18f5de03aa93",
        "rendered-sst2": "a6c32e68a3b2",
    },
    "tall": {
        "stanford_cars": "0d22bd2df28f",
        "dtd": "e9ba80ec3b0c",
        "eurosat": "06ba55474f15",
        "gtsrb": "b90ab45ae000",
        "mnist": "2886561c388e",
        "resisc45": "3642784ea2c9",
        "svhn": "2886561c388e",
        "sun397": "19b4780d8a38",
        "stl10": "46a16cf8f0dd",
        "oxford-iiit-pet": "3bde597e0ee3",
        "oxford_flowers102": "69828d101c2a",
        "cifar100": "15002e7e0585",
        "pcam": "39c58d87bca4",
        "fer2013": "1c75f30b813e",
        "cifar10": "8fd45ee96f83",
        "food101": "1ca226789b5e",
        "fashion_mnist": "26ee83b9230d",
        "rendered-sst2": "a6c32e68a3b2",
        "emnist": "268fcedfc1d5",
        "kmnist": "2cc736771ed9",
    },
}
"""Family -> task -> of its classes and templates."""

every_suite = pytest.mark.parametrize("name", published())


def largest(family: str) -> Suite:
    return Suite.load(f"{family}/ViT-B-32-20")


def test_there_are_eighteen() -> None:
    backbones = ("ViT-B-16", "ViT-B-32", "ViT-L-14")
    assert list(published()) == [f"{family}/{name}-{n}" for family in FAMILIES for name in backbones for n in (8, 14, 20)]


@every_suite
def test_every_suite_is_complete(name: str) -> None:
    suite, (family, model) = Suite.load(name), name.split("/")
    backbone, _, count = model.rpartition("-")
    assert (suite.name, len(suite.tasks)) == (name, int(count))
    assert (suite.backbone, suite.pretrained) == (f"{backbone}-quickgelu", "openai")
    experts = [str(task.expert) for task in suite.tasks.values()]
    assert len(set(experts)) == len(experts)
    assert all(expert.startswith({"tall": "hf-hub:nik-dim/", "fusion_bench": "hf-hub:tanganke/"}[family]) for expert in experts)
    for task in suite.tasks.values():
        assert list(task.data) == ["val", "test", "train"]
        assert not [fault for source in task.data.values() for fault in config_faults(source)]
        assert (task.data["val"]["part"], task.data["train"]["part"]) == ("val", "train")
        assert "part" not in task.data["test"]
        assert len(set(task.classes)) == len(task.classes)


@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_suites_are_the_first_tasks_of_the_larger(family: str) -> None:
    tasks = list(largest(family).tasks)
    assert list(Suite.load(f"{family}/ViT-L-14-14").tasks) == tasks[:14]
    assert list(Suite.load(f"{family}/ViT-B-16-8").tasks) == tasks[:8]


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_are_those_of_the_notes(family: str) -> None:
    index = notes("_index")
    if family == "fusion_bench":
        assert list(largest(family).tasks) == index["suites"]["20"]
        for backbone in ("32", "16"):
            suite = Suite.load(f"{family}/ViT-B-{backbone}-20")
            ids = index["tanganke_full"][f"clip-vit-base-patch{backbone}"]
            assert {name: str(task.expert) for name, task in suite.tasks.items()} == {k: f"hf-hub:{v}" for k, v in ids.items()}
    else:
        titles = [task.title for task in PublishedSuite.load(f"{family}/ViT-B-32-20").tasks.values()]
        assert titles == index["suites"]["order_in_tall"]


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_data_and_accuracies_are_those_of_the_notes(family: str) -> None:
    for name, task in largest(family).tasks.items():
        texts = texts_of(family, name)
        assert list(task.classes) == texts["classes"], name
        assert list(task.templates) == texts["templates"], name
        found = notes(name)
        if found["hub"]["id"]:
            test = task.data["test"]
            assert (test["hub"], test.get("name")) == (found["hub"]["id"], found["hub"].get("config"))
            assert (test["split"], task.data["val"]["split"]) == (found["hub"]["test"], found["hub"]["train"])
            columns = (test.get("image", "image"), test.get("label", "label"))
            assert columns == (found["hub"]["image"], found["hub"]["label"])
        if family == "fusion_bench":
            assert task.accuracy == found["finetuned_b32"]
    for task in PublishedSuite.load(f"{family}/ViT-B-32-20").tasks.values():
        sizes = notes(task.name)["sizes"]
        assert task.images == {split: sizes[split] for split in ("train", "test")}


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_that_were_compared_with_the_notes(family: str) -> None:
    found = {}
    for name, task in largest(family).tasks.items():
        text = json.dumps([task.classes, task.templates], ensure_ascii=False)
        found[name] = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert found == HASHES[family]


def test_the_accuracies_of_tall_are_whole_numbers_of_images() -> None:
    for backbone in ("ViT-B-32", "ViT-B-16", "ViT-L-14"):
        suite = PublishedSuite.load(f"tall/{backbone}-20")
        for task in suite.tasks.values():
            if task.name == "dtd":  # of an expert that had seen the test images
                assert "accuracy" not in task.content
                continue
            right = task.content["accuracy"] / 100 * task.images["test"]
            assert abs(right - round(right)) <= 0.00005 * task.images["test"]  # rounded to hundredths of a percent


def test_variants_have_a_reason() -> None:
    variants = {family: {task.name for task in _tasks(family) if task.variant} for family in FAMILIES}
    assert variants["fusion_bench"] == {"food101"}
    assert variants["tall"] >= {"fer2013", "food101"}
    assert {task.name for task in _tasks("tall")} - {task.name for task in _tasks("fusion_bench")} == {"emnist"}


def _tasks(family: str) -> list[Any]:
    return list(PublishedSuite.load(f"{family}/ViT-B-32-20").tasks.values())


def test_the_swapped_names_of_food101_are_not_compared_with_the_data() -> None:
    ours, theirs = (largest(family).tasks["food101"] for family in FAMILIES)
    assert ours.classes[16:18] == ("cheese plate", "cheesecake")
    assert ours.data_classes[15:19] == ("ceviche", "", "", "chicken curry")
    assert theirs.classes[16:18] == ("cheesecake", "cheese_plate")
    assert theirs.data_classes == theirs.classes


def test_validation_follows_the_family() -> None:
    assert largest("tall").tasks["mnist"].data["val"] == {"hub": "ylecun/mnist", "split": "train", "part": "val"}
    assert largest("fusion_bench").tasks["mnist"].data["val"]["cap"] is False


def test_a_file_of_the_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("tall/ViT-B-32-8") == published()["tall/ViT-B-32-8"]
    (tmp_path / "tall").mkdir()
    (tmp_path / "tall" / "ViT-B-32-8").touch()
    assert locate("tall/ViT-B-32-8") == tmp_path / "tall" / "ViT-B-32-8"
    with pytest.raises(InputError, match="did you mean `fusion_bench/ViT-B-32-8`"):
        locate("fusion_bench/ViT-B-32-7")
