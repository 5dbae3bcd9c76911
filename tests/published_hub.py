"""Published suites in miniature: experts and data with the hub's names and schemas, a few pixels and images each."""

import gzip
import hashlib
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from loopback_hub import LoopbackHub, point_at
from PIL import Image
from safetensors.torch import load_file, save
from tiny import delta, encoded, write_backbone, write_file
from torch import Tensor

from mergekit_vision.encoders.backbone import describe_backbone
from mergekit_vision.export.hf_layout import layout_config, layout_weights
from mergekit_vision.suites.catalog import PublishedSuite, PublishedTask

IMAGES = {"train": 20, "test": 6}
"""Of each split; two of ``train`` are for validation."""

EMNIST = "emnist-digits-{part}-{content}-ubyte"
"""File of torchvision's EMNIST."""

EXTRA_SPLITS = {"gtsrb": "contrast", "resisc45": "gaussian_noise"}


def miniature(hub: LoopbackHub, name: str, place: Path, monkeypatch: pytest.MonkeyPatch, **own: Any) -> Path:
    """A suite that extends a published one with a small backbone; all else is on the hub that this process sees."""
    pytest.importorskip("datasets")
    write_backbone(place / "base")
    left_out = {task for task, content in own.get("tasks", {}).items() if content is None}
    tasks = {task: known for task, known in PublishedSuite.load(name).tasks.items() if task not in left_out}
    fill(hub, tasks, place / "base")
    if "emnist" in tasks:
        serve_emnist(hub, monkeypatch)
    point_at(hub, place / "home", monkeypatch)
    return write_file(place, {"extends": name, "backbone": "local-dir:base", **own})


def serve_emnist(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torchvision find its EMNIST here, a few images of 28 x 28 pixels whose upper half is white."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        for part, count in IMAGES.items():
            pixels = bytes([255] * 14 * 28 + [0] * 14 * 28) * count
            files = {
                "images-idx3": struct.pack(">4i", 2051, count, 28, 28) + pixels,
                "labels-idx1": struct.pack(">2i", 2049, count) + bytes(number % 10 for number in range(count)),
            }
            for content, data in files.items():
                packed.writestr(f"gzip/{EMNIST.format(part=part, content=content)}.gz", gzip.compress(data))
    hub.commit("torchvision/emnist", {"gzip.zip": archive.getvalue()})
    monkeypatch.setattr(torchvision.datasets.EMNIST, "url", f"{hub.endpoint}/torchvision/emnist/resolve/main/gzip.zip")
    monkeypatch.setattr(torchvision.datasets.EMNIST, "md5", hashlib.md5(archive.getvalue()).hexdigest())


def fill(hub: LoopbackHub, tasks: Mapping[str, PublishedTask], backbone: Path) -> None:
    """Put everything that some tasks need on the hub.

    Args:
        hub: where to.
        tasks: the tasks.
        backbone: directory of a small one, of :func:`tiny.write_backbone`.
    """
    for seed, task in enumerate(tasks.values()):
        push_expert(hub, task.expert, backbone, seed)
        if "hub" in task.content["data"]["test"]:
            push_data(hub, task)


def push_expert(hub: LoopbackHub, address: str, backbone: Path, seed: int) -> None:
    """An expert as its family stores it: fusion_bench a CLIPVisionModel without projection, TALL the tensors of an encoder."""
    repository, _, inside = address.removeprefix("hf-hub:").partition(":")
    generator, base = torch.Generator().manual_seed(seed), load_file(backbone / "open_clip_model.safetensors")
    tuned = {key: value + delta(value, generator) if key.startswith("visual.") else value for key, value in base.items()}
    if not inside:
        hub.commit(repository, clip_vision_model(tuned, backbone))
        return
    content = io.BytesIO()
    torch.save({f"model.{key}": value for key, value in tuned.items()}, content)
    hub.commit(repository, {inside: content.getvalue()})


def clip_vision_model(weights: dict[str, Tensor], backbone: Path) -> dict[str, bytes | str | Path]:
    """The files of a CLIPVisionModel of transformers with the vision tower of these weights."""
    pytest.importorskip("transformers")
    config = layout_config(describe_backbone(f"local-dir:{backbone}"), logit_scale=2.66)
    renamed = layout_weights(weights, config).items()
    tower = {name: value.contiguous() for name, value in renamed if name.startswith("vision_model.")}
    return {"model.safetensors": save(tower), "config.json": json.dumps(config["vision_config"])}


def push_data(hub: LoopbackHub, task: PublishedTask) -> None:
    """A data set with the columns, label type, configurations and splits of the published one."""
    source, splits = task.content["data"]["test"], {part["split"]: name for name, part in task.content["data"].items()}
    configuration = source.get("name", "default")
    files: dict[str, bytes | str | Path] = {}
    for split, name in {**splits, **({extra: "test"} if (extra := EXTRA_SPLITS.get(task.name)) else {})}.items():
        count = IMAGES["test" if name == "test" else "train"]
        if task.name == "fer2013":
            files[f"{configuration}/{split}.tar"] = webdataset(task, count)
        else:
            files[f"{configuration}/{split}.parquet"] = parquet(task, count)
    cards = [configured(configuration, list(files))]
    if task.name == "svhn":  # two configurations, of which neither is the default
        files["full_numbers/test.parquet"] = parquet(task, 3)
        cards.append(configured("full_numbers", ["full_numbers/test.parquet"]))
    files["README.md"] = "\n".join(["---", "configs:", *cards, "---", ""])
    hub.commit(source["hub"], files, kind="dataset")


def configured(name: str, files: list[str]) -> str:
    """A configuration in a data set's card, with a split of each file's name."""
    splits = "\n".join(f"  - split: {Path(file).stem}\n    path: {file}" for file in files)
    return f"- config_name: {name}\n  data_files:\n{splits}"


def webdataset(task: PublishedTask, count: int) -> bytes:
    """A shard with an image and a text with its class in a file each, as FER2013 is published: no names of classes."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as shard:
        for number, label in enumerate(labels_of(task, count)):
            for suffix, data in (("cls", str(label).encode()), ("jpg", picture(number))):
                member = tarfile.TarInfo(f"s{number:07}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    return content.getvalue()


def labels_of(task: PublishedTask, count: int) -> list[int]:
    """Labels that run through the classes."""
    return [number * 7 % len(task.content["classes"]) for number in range(count)]


def picture(number: int) -> bytes:
    return encoded(Image.new("RGB", (20, 18), (10 * number % 256, 90, 200)))


def parquet(task: PublishedTask, count: int) -> bytes:
    """Images and their labels."""
    source = task.content["data"]["test"]
    image, label = source.get("image", "image"), source.get("label", "label")
    labels: list[Any] = labels_of(task, count)
    feature: dict[str, Any] = {"names": names_in_data(task), "_type": "ClassLabel"}
    if task.name == "pcam":
        labels, feature = [bool(value) for value in labels], {"dtype": "bool", "_type": "Value"}
    cells = [{"bytes": picture(number), "path": None} for number in range(count)]
    info = {"info": {"features": {image: {"_type": "Image"}, label: feature}}}
    table = pa.table(
        {image: pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), label: pa.array(labels)}
    )
    content = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), content)
    return content.getvalue()


def names_in_data(task: PublishedTask) -> list[str]:
    """The names that the hub's data gives its classes: Food101's are in another order than fusion_bench's texts."""
    classes = list(task.content["classes"])
    for index in task.content.get("misnamed", []):
        classes[index] = task.content["classes"][33 - index].replace(" ", "_")  # 16 and 17 are exchanged
    return classes
