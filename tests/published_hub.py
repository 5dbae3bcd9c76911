"""Published suites in miniature: experts and data with the hub's names and schemas, a few pixels and images each."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from clip_models import huggingface_config
from loopback_hub import LoopbackHub
from PIL import Image
from safetensors.torch import save
from tiny import delta, encoded
from torch import Tensor

from mergekit_vision.suites.catalog import PublishedSuite, PublishedTask

IMAGES = {"train": 20, "test": 6}
"""Of each split; two of ``train`` are for validation."""

EXTRA_SPLITS = {"gtsrb": "contrast", "resisc45": "gaussian_noise"}


def fill(hub: LoopbackHub, suite: PublishedSuite, base: Mapping[str, Tensor]) -> None:
    """Put everything that a suite needs on the hub, for a small backbone.

    Args:
        hub: where to.
        suite: the suite.
        base: weights of the backbone's vision tower, by open_clip key.
    """
    for seed, task in enumerate(suite.tasks.values()):
        push_expert(hub, task.expert, base, seed)
        if "hub" in task.content["data"]["test"]:
            push_data(hub, task)


def push_expert(hub: LoopbackHub, address: str, base: Mapping[str, Tensor], seed: int) -> None:
    """An expert as its family stores it: fusion_bench a CLIPVisionModel without projection, TALL the tensors of an encoder."""
    repository, _, inside = address.removeprefix("hf-hub:").partition(":")
    if not inside:
        hub.commit(repository, clip_vision_model(seed))
        return
    generator = torch.Generator().manual_seed(seed)
    content = io.BytesIO()
    torch.save({f"model.{key}": value + delta(value, generator) for key, value in base.items()}, content)
    hub.commit(repository, {inside: content.getvalue()})


def clip_vision_model(seed: int) -> dict[str, bytes | str | Path]:
    """The files of a small random CLIPVisionModel of transformers."""
    from transformers import CLIPVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPVisionModel(huggingface_config("gelu").vision_config)
    state = {f"vision_model.{key.removeprefix('vision_model.')}": value for key, value in model.state_dict().items()}
    return {"model.safetensors": save(state), "config.json": model.config.to_json_string()}


def push_data(hub: LoopbackHub, task: PublishedTask) -> None:
    """A data set with the columns, label type, configurations and splits of the published one."""
    source, splits = task.content["data"]["test"], {part["split"]: name for name, part in task.content["data"].items()}
    configuration = source.get("name", "default")
    files: dict[str, bytes | str | Path] = {}
    for split, name in {**splits, **({extra: "test"} if (extra := EXTRA_SPLITS.get(task.name)) else {})}.items():
        files[f"{configuration}/{split}.parquet"] = parquet(task, IMAGES["test" if name == "test" else "train"])
    listed = [(configuration, name.split("/")[1].removesuffix(".parquet")) for name in files]
    cards = [configured(configuration, [split for _, split in listed])]
    if task.name == "svhn":  # two configurations, of which neither is the default
        files["full_numbers/test.parquet"] = parquet(task, 3)
        cards.append(configured("full_numbers", ["test"]))
    files["README.md"] = "\n".join(["---", "configs:", *cards, "---", ""])
    hub.commit(source["hub"], files, kind="dataset")


def configured(name: str, splits: list[str]) -> str:
    files = "\n".join(f"  - split: {split}\n    path: {name}/{split}.parquet" for split in splits)
    return f"- config_name: {name}\n  data_files:\n{files}"


def parquet(task: PublishedTask, count: int) -> bytes:
    """Images whose labels run through the classes."""
    source = task.content["data"]["test"]
    image, label = source.get("image", "image"), source.get("label", "label")
    classes = names_in_data(task)
    labels: list[Any] = [number * 7 % len(classes) for number in range(count)]
    feature: dict[str, Any] = {"names": classes, "_type": "ClassLabel"}
    if task.name == "pcam":
        labels, feature = [bool(value) for value in labels], {"dtype": "bool", "_type": "Value"}
    elif task.name == "fer2013":
        feature = {"dtype": "int64", "_type": "Value"}
    cells = [{"bytes": encoded(Image.new("RGB", (20, 18), (10 * n % 256, 90, 200))), "path": None} for n in range(count)]
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
