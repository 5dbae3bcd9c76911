"""Images per second of CPU time that a pass over a test set reads, by kind of file, and what bounds an evaluation.

    python -m benchmarks.reading --workdir DIR                         # ViT-B-32, 96 images of 500 x 375 pixels

The library's loader reads JPEG files in folders, PNG files inside Parquet, and pixels that an earlier pass left in its cache.
Beside it stand torchvision's ``ImageFolder`` in a ``DataLoader``, and a bare loop that opens one file after the other. All end in
normalized batches, with open_clip's transform, and the same ones: this is checked. All run in the main process and take turns,
round by round; a figure is the median over rounds, a ratio that of (CPU time of the bare loop / of the variant) within a round.
``share`` is the part of an evaluation's CPU time that goes into reading, beside a forward pass measured in the same rounds.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.evaluation import photos
from benchmarks.machine import write
from mergekit_vision.data.loader import PixelLoader
from mergekit_vision.data.pixel_cache import PixelCache
from mergekit_vision.data.preprocess import eval_transform
from mergekit_vision.encoders.backbone import describe_backbone
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.sources.opening import open_source

Batches = Iterable[tuple[Tensor, Tensor]]
FORWARD = "forward pass"


def parquet(folder: Path, path: Path) -> Path:
    """The photographs of a folder as PNG in a Parquet file, in the same order; made where it is not there yet."""
    if not path.exists():
        rows = []
        for label, place in enumerate(sorted(folder.iterdir())):
            for photo in sorted(place.iterdir()):
                Image.open(photo).save(png := io.BytesIO(), "png")
                rows.append({"image": {"bytes": png.getvalue(), "path": photo.name}, "label": label})
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    return path


def ours(config: dict[str, Any], model: str, batch: int, cache: PixelCache) -> PixelLoader:
    """The library's loader of a source, in the main process."""
    return PixelLoader(
        open_source(config),
        eval_transform(describe_backbone(model).preprocess),
        sampler=None,
        batch_size=batch,
        num_workers=0,
        device=torch.device("cpu"),
        images_only=False,
        cache=cache,
        key=("images",),
    )


def bare(images: Callable[[], Iterator[Any]], transform: Callable[[Any], Tensor], batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A loop without a loader; the labels do not matter."""
    part: list[Tensor] = []
    for image in images():
        part.append(transform(image))
        if len(part) == batch:
            yield torch.stack(part), torch.zeros(batch)
            part = []
    if part:
        yield torch.stack(part), torch.zeros(len(part))


def variants(folder: Path, table: Path, model: str, batch: int) -> dict[str, Callable[[], Batches]]:
    """What reads the images, each anew when it is called."""
    transform = image_transform_v2(PreprocessCfg(**describe_backbone(model).preprocess), is_train=False)
    kept = ours({"folder": str(folder)}, model, batch, PixelCache(1 << 40))
    list(kept)
    return {
        "JPEG, bare loop": lambda: bare(lambda: map(Image.open, sorted(folder.glob("*/*"))), transform, batch),
        "JPEG folder, ImageFolder": lambda: DataLoader(ImageFolder(str(folder), transform), batch),
        "JPEG folder": lambda: ours({"folder": str(folder)}, model, batch, PixelCache(0)),
        "PNG, bare loop": lambda: bare(lambda: _pngs(table), transform, batch),
        "PNG in Parquet": lambda: ours({"parquet": str(table)}, model, batch, PixelCache(0)),
        "decoded pixels": lambda: kept,
    }


def _pngs(table: Path) -> Iterator[Any]:
    for cell in pq.read_table(table)["image"].to_pylist():
        yield Image.open(io.BytesIO(cell["bytes"]))


def beside(name: str) -> str:
    """The bare loop over the same files; for pixels from the cache, over those that they were decoded from."""
    return "PNG, bare loop" if name.startswith("PNG") else "JPEG, bare loop"


def same(readers: dict[str, Callable[[], Batches]]) -> None:
    """Make sure that all that read the same files give the same images."""
    found = {name: torch.cat([images for images, _ in read()]) for name, read in readers.items()}
    for name, images in found.items():
        if not torch.equal(images, found[beside(name)]):
            raise RuntimeError(f"{name} and the bare loop disagree")


@torch.inference_mode()
def measure(readers: dict[str, Callable[[], Batches]], encoder: VisionEncoder, rounds: int) -> list[dict[str, Any]]:
    """Rows of one set of files."""
    first, _ = next(iter(readers["decoded pixels"]()))
    images = sum(len(labels) for _, labels in readers["decoded pixels"]())
    took: dict[str, list[float]] = {name: [] for name in (*readers, FORWARD)}  # CPU seconds of an image
    encoder(first)
    for _ in range(rounds):
        for name, read in readers.items():
            took[name].append(_cpu(lambda read=read: [None for _ in read()]) / images)  # type: ignore[misc]
        took[FORWARD].append(_cpu(lambda: encoder(first)) / len(first))
    rows = []
    for name, seconds in took.items():
        row = {"variant": name, "images": images, "rounds": rounds, "images_per_cpu_second": round(1 / median(seconds), 1)}
        if name != FORWARD:
            row["cpu_ratio"] = round(median(base / one for base, one in zip(took[beside(name)], seconds, strict=True)), 3)
            row["share"] = round(median(one / (one + run) for one, run in zip(seconds, took[FORWARD], strict=True)), 3)
        rows.append(row)
    return rows


def _cpu(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write ``benchmarks/results/reading-cpu.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="folder of made-up images; kept between runs")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip name; its shapes are used")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    folder = photos(options.workdir / f"photos-{options.images}", options.images, 0)
    readers = variants(folder, parquet(folder, folder.with_suffix(".parquet")), options.model, options.batch)
    same(readers)
    encoder = VisionEncoder(open_clip.create_model(options.model, load_weights=False).visual).eval().requires_grad_(False)
    rows = [{"model": options.model, "batch": options.batch, **row} for row in measure(readers, encoder, options.rounds)]
    names = ("model", "images", "batch", "variant", "images_per_cpu_second", "cpu_ratio", "share")
    table = Table("model", "images", "batch", "variant", "images/CPU s", "of the bare loop's", "share of an evaluation")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in names))
    Console(width=120).print(table)
    print(f"written: {write('reading', torch.device('cpu'), rows, ('model', 'images', 'batch', 'variant'))}")


if __name__ == "__main__":
    main()
