"""Images per second of CPU time that a pass over a test set reads, by kind of file, and what bounds an evaluation.

    python -m benchmarks.reading      # ViT-B-32, 96 images of 500 x 375 pixels

The library's loader reads JPEG files in folders, PNG files inside Parquet, and pixels that an earlier pass left in its cache.
Beside it stand torchvision's ``ImageFolder`` in a ``DataLoader``, and a bare loop that opens one file after the other. All end in
normalized batches, with open_clip's transform, and the same ones: this is checked. All run in the main process and take turns,
round by round; a figure is the median over rounds, a ratio that of (CPU time of the bare loop / of the variant) within a round.
``share`` is the part of an evaluation's CPU time that goes into reading, beside a forward pass measured in the same rounds.
"""

import io
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks import records
from benchmarks.evaluation import photos
from benchmarks.experts import label
from benchmarks.machine import Recorder
from benchmarks.records import Row
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
def measure(readers: dict[str, Callable[[], Batches]], encoder: VisionEncoder, rounds: int, about: records.Case) -> Iterator[Row]:
    """Rows of one set of files."""
    first, _ = next(iter(readers["decoded pixels"]()))
    images = sum(len(labels) for _, labels in readers["decoded pixels"]())
    took: dict[str, list[float]] = {name: [] for name in (*readers, FORWARD)}  # CPU seconds of an image
    encoder(first)
    for _ in range(rounds):
        for name, read in readers.items():
            took[name].append(_cpu(lambda read=read: [None for _ in read()]) / images)  # type: ignore[misc]
        took[FORWARD].append(_cpu(lambda: encoder(first)) / len(first))
    for name, seconds in took.items():
        samples = {"images_per_cpu_second": [1 / one for one in seconds]}
        if name != FORWARD:
            samples["cpu_speedup"] = [base / one for base, one in zip(took[beside(name)], seconds, strict=True)]
            samples["share"] = [one / (one + run) for one, run in zip(seconds, took[FORWARD], strict=True)]
        yield Row.of({**about, "images": images, "variant": name}, samples)


def _cpu(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep the rows."""
    parser = records.parser("reading", __doc__)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip name; its shapes are used")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    folder = photos(options.workdir / f"photos-{options.images}", options.images, 0)
    readers = variants(folder, parquet(folder, folder.with_suffix(".parquet")), options.model, options.batch)
    same(readers)
    encoder = VisionEncoder(open_clip.create_model(options.model, load_weights=False).visual).eval().requires_grad_(False)
    about: records.Case = {"model": label(options.model), "batch": options.batch}
    recorder = Recorder("reading", options.results)
    recorder.keep(measure(readers, encoder, options.rounds, about))
    print(f"written: {recorder.path}")


if __name__ == "__main__":
    main()
