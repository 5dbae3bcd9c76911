"""A tiny suite made on the spot: a random CLIP model, three tasks of noisy pictures, and an expert of each."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {
    "model_cfg": {
        "embed_dim": 32,
        "quick_gelu": False,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {
        "mean": [0.48, 0.46, 0.41],
        "std": [0.27, 0.26, 0.28],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}

TASKS = {
    "colors": (("red", "green", "blue"), ("a photo of a {} square.", "something {}.")),
    "grays": (("dark", "medium", "bright", "white", "black"), ("a {} shade of gray.",)),
    "stripes": (("horizontal", "vertical"), ("a pattern of {} stripes.",)),
}

SIZES = {"val": 37, "test": 41}


def write_suite(root: Path) -> Path:
    """Save the whole suite; its file."""
    weights = write_backbone(root / "base")
    tasks = {}
    for seed, (name, (classes, templates)) in enumerate(TASKS.items(), start=1):
        for split, size in SIZES.items():
            path = root / "data" / name / f"{split}.parquet"
            write_parquet(path, name, classes, size, seed=10 * seed + (split == "test"))
        tasks[name] = {
            "expert": write_expert(root / "experts", name, weights, seed),
            "data": {split: {"parquet": f"data/{name}/{split}.parquet"} for split in SIZES},
            "classes": list(classes),
            "templates": list(templates),
        }
    return write_file(root, {"name": "tiny", "backbone": "local-dir:base", "tasks": tasks})


def content_of(root: Path) -> dict[str, Any]:
    """What the suite file in a directory says."""
    content: dict[str, Any] = yaml.safe_load((root / "suite.yaml").read_text())
    return content


def write_file(root: Path, content: dict[str, Any]) -> Path:
    """Write the suite file of a directory."""
    (root / "suite.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return root / "suite.yaml"


def write_backbone(place: Path, config: dict[str, Any] = CONFIG) -> dict[str, Tensor]:
    """Save a seeded random model in open_clip's ``local-dir:`` layout; its vision tower's weights."""
    import open_clip

    place.mkdir()
    (place / "open_clip_config.json").write_text(json.dumps(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{place}", load_weights=False)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, place / "open_clip_model.safetensors")
    return {name: value for name, value in state.items() if name.startswith("visual.")}


def write_expert(place: Path, task: str, base: dict[str, Tensor], seed: int) -> str:
    """Save the base plus a seeded delta (rank 4, and noise), each task in its own style of checkpoint; its path in the suite."""
    place.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tuned = {name: value + delta(value, generator) for name, value in base.items()}
    if task == "colors":
        save_file({**tuned, "logit_scale": torch.tensor(2.0)}, place / f"{task}.safetensors")
    elif task == "grays":
        text = {"model.text_projection": torch.zeros(2, 2)}
        torch.save({**{f"model.{name}": value for name, value in tuned.items()}, **text}, place / f"{task}.pt")
        return f"experts/{task}.pt"
    else:
        save_file({name.removeprefix("visual."): value for name, value in tuned.items()}, place / f"{task}.safetensors")
    return f"experts/{task}.safetensors"


def delta(value: Tensor, generator: torch.Generator) -> Tensor:
    """A plausible task vector: small noise, and for matrices a rank of 4 above it."""
    noise = 0.002 * torch.randn(value.shape, generator=generator)
    if value.dim() != 2:
        return noise
    left, right = (torch.randn(side, 4, generator=generator) for side in value.shape)
    return noise + 0.02 * left @ right.T


def write_parquet(path: Path, task: str, classes: tuple[str, ...], size: int, seed: int) -> None:
    """Write seeded images of a task in the Hugging Face image schema, in row groups of 16."""
    random = np.random.RandomState(seed)
    labels = random.permutation(np.arange(size) % len(classes))
    cells = [{"bytes": encoded(picture(task, int(label), random)), "path": None} for label in labels]
    features = {"image": {"_type": "Image"}, "label": {"names": list(classes), "_type": "ClassLabel"}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_arrays([pa.array(cells, schema.field("image").type), pa.array(labels)], schema=schema)
    pq.write_table(table, path, row_group_size=16)


def picture(task: str, label: int, random: np.random.RandomState) -> Image.Image:
    """One noisy image of 20 x 24 pixels of a class; the grays are grayscale files."""
    pixels = random.randint(0, 80, (20, 24, 3))
    if task == "colors":
        pixels[:, :, label] += 150
    elif task == "grays":
        return Image.fromarray((pixels[:, :, 0] + 40 * label).clip(0, 255).astype(np.uint8))
    else:
        rows = (np.arange(20)[:, None] if label == 0 else np.arange(24)[None, :]) // 3 % 2
        pixels += 150 * np.broadcast_to(rows, (20, 24))[:, :, None]
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image) -> bytes:
    """PNG bytes of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
