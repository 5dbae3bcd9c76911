"""Images per second of ``test`` beside a bare loop over the same encoder and the same decoded batches.

    python -m benchmarks.evaluation                     # ViT-B-32, two tasks of 256 images, batch 64
    python -m benchmarks.evaluation --device cuda --precision 32-true bf16-mixed --batches 128 --images 4096
    python -m benchmarks.evaluation --workers 0 1 2     # and what a first pass, which decodes, costs

``test`` is the library's ``Trainer.test`` on a model it has merged: Lightning's loop, batches made from the cached pixels, the
metrics, the table and ``results.json``. Its time runs from the start of the evaluation to its end; merging is not part of it,
nor is the first decoding. The bare loop finds its images decoded, normalized and on the device. It and every variant of a case
take turns, round by round; a ratio is the median over rounds of (time of the bare loop / time of the variant) within a round.
On a busy machine, and on the CPU, the ratio of processor times tells more: it counts this process alone. Weights are random: the
cost does not depend on them. That both sides count the same right images is checked.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import lightning
import numpy as np
import open_clip
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from benchmarks import records
from benchmarks.experts import label, prepare, quietly
from benchmarks.machine import Recorder
from benchmarks.meter import Cost
from benchmarks.records import Row
from mergekit_vision.checkpoints import save_safetensors
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.encoders.backbone import describe_backbone
from mergekit_vision.registry import mergers
from mergekit_vision.runs.module import MergedCLIP
from mergekit_vision.runs.trainer import Precision, Trainer

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}  # small: its heads are made once
CLASSES = 10

Outcome = tuple[Cost, dict[str, float]]
"""What a pass cost, and the accuracies it found."""


class Clock(lightning.Callback):
    """Cost of the latest evaluation, from its start to its end."""

    cost: Cost

    def on_test_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start."""
        self._start = Cost.now()

    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stop; the counts have been read from the device, so its work is done."""
        self.cost = Cost.now().since(self._start)


def suite(place: Path, model: str, tasks: int, images: int, layers: int | None = None) -> Path:
    """A suite of made-up experts, of the first blocks or all, and JPEG files, made where it is not there yet; its YAML file."""
    files = prepare(place, model, layers, tasks, proxies=1)
    root = files.base.parent
    backbone = root / "backbone"
    if not (backbone / "open_clip_config.json").exists():
        backbone.mkdir(exist_ok=True)
        _save_backbone(backbone, model, files.base, layers)
    content = {
        "name": f"{label(model)}{'' if layers is None else f'-{layers}-blocks'}-made-up",
        "backbone": "local-dir:backbone",
        "tasks": {
            f"task-{task}": {
                "expert": files.experts[task].name,
                "data": {
                    split: {"folder": str(photos(root / f"{split}-{images}" / str(task), images, seed + task).relative_to(root))}
                    for split, seed in {"val": 1000, "test": 0}.items()
                },
                "templates": ["a photo of a {}."],
            }
            for task in range(tasks)
        },
    }
    path = root / f"suite-{tasks}-{images}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def _save_backbone(place: Path, model: str, vision: Path, layers: int | None) -> None:
    """The vision tower with a small text tower, in open_clip's ``local-dir:`` layout."""
    known = describe_backbone(model)
    tower = dict(known.model["vision_cfg"]) | ({} if layers is None else {"layers": layers})
    config = {**known.model, "vision_cfg": tower, "text_cfg": TEXT}
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": dict(known.preprocess)}))
    with quietly():
        clip = open_clip.create_model(f"local-dir:{place}", load_weights=False)
    save_safetensors(place / "open_clip_model.safetensors", {**clip.state_dict(), **load_file(vision)})


def photos(place: Path, images: int, seed: int) -> Path:
    """A folder of smooth random JPEG files of 500 x 375 pixels, which cost about what photographs do."""
    random = np.random.RandomState(seed)
    for number in range(images):
        path = place / f"thing {number % CLASSES}" / f"{number:05}.jpg"
        coarse = Image.fromarray(random.randint(0, 256, (30, 40, 3), dtype=np.uint8))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return place


class Case:
    """One merged model, and its test images both on disk and as finished batches on the device."""

    def __init__(self, suite: Path, output: Path, batch: int, device: str, precision: Precision) -> None:
        self.suite, self.batch, self.device = suite, batch, device
        self.clock = Clock()
        self.trainer = Trainer(
            accelerator=device, devices=1, precision=precision, callbacks=self.clock, default_root_dir=str(output)
        )
        self.model = MergedCLIP(mergers()["Average"]())
        self.data = VisionTasks(str(suite), batch)
        self.test(self.data)  # merges, measures the experts and fills the cache of pixels
        self.batches = {
            task: [(images.to(device), labels.to(device)) for images, labels in self.data.loader(task, "test")]
            for task in self.data.task_names
        }
        self.images = sum(self.data.size(task, "test") for task in self.data.task_names)

    def test(self, data: VisionTasks) -> Outcome:
        """One evaluation by ``Trainer.test``."""
        self.trainer.test(self.model, data)
        logged = self.trainer.callback_metrics
        return self.clock.cost, {task: float(logged[f"accuracy/{task}"]) for task in data.task_names}

    @torch.inference_mode()
    def bare(self) -> Outcome:
        """One pass of the bare loop."""
        encoder, heads = self.model.encoder, self.model.heads
        assert encoder is not None
        for part in (encoder, heads):  # Lightning has taken them off the device
            part.to(self.device)
        start, right = Cost.now(), {}
        with self.trainer.precision_plugin.forward_context():
            for task, batches in self.batches.items():
                right[task] = sum((heads(encoder(images), task).argmax(-1) == labels).sum() for images, labels in batches)
        accuracies = {task: int(count) / self.data.size(task, "test") for task, count in right.items()}
        return Cost.now().since(start), accuracies

    def decoding(self, workers: int) -> Outcome:
        """One evaluation that has to decode its images."""
        return self.test(VisionTasks(str(self.suite), self.batch, num_workers=workers, cache_mb=0))


def measure(case: Case, workers: list[int], budget: float, about: records.Case) -> Iterator[Row]:
    """Rows of one case: every variant in turns until the time is up, three rounds at least."""
    runs: dict[str, Callable[[], Outcome]] = {"bare loop": case.bare, "test": lambda: case.test(case.data)}
    for number in workers:
        runs[f"test, decoding, {number} workers"] = lambda number=number: case.decoding(number)  # type: ignore[misc]
    case.bare()
    rounds: list[dict[str, Cost]] = []
    start = time.perf_counter()
    while len(rounds) < 3 or time.perf_counter() - start < budget:
        outcomes = {name: run() for name, run in runs.items()}
        _same({name: accuracies for name, (_, accuracies) in outcomes.items()})
        rounds.append({name: cost for name, (cost, _) in outcomes.items()})
    for name in runs:
        pairs = [(took["bare loop"], took[name]) for took in rounds]
        samples = {
            "images_per_second": [case.images / cost.wall for _, cost in pairs],
            "speedup": [bare.wall / cost.wall for bare, cost in pairs],
            "cpu_speedup": [bare.cpu / cost.cpu for bare, cost in pairs],
        }
        yield Row.of({**about, "variant": name}, samples)


def _same(accuracies: Mapping[str, Mapping[str, float]]) -> None:
    """Make sure that all variants counted the same right images; Lightning logs float32."""
    for name, values in accuracies.items():
        if any(abs(value - accuracies["bare loop"][task]) > 1e-6 for task, value in values.items()):
            raise RuntimeError(f"{name} and the bare loop disagree: {accuracies}")


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep the rows."""
    parser = records.parser("evaluation", __doc__)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip name; its shapes are used")
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--images", type=int, default=256, help="images a task")
    parser.add_argument("--batches", nargs="+", type=int, default=[64])
    parser.add_argument("--precision", nargs="+", default=["32-true"], help="of the forward passes; bf16-mixed")
    parser.add_argument("--workers", nargs="*", type=int, default=[], help="also measure passes that decode with as many")
    parser.add_argument("--seconds", type=float, default=60.0, help="time of one case, three rounds at least")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    path = suite(options.workdir, options.model, options.tasks, options.images)
    recorder = Recorder("evaluation", options.results, options.device)
    for batch in options.batches:
        for precision in options.precision:
            case = Case(path, options.workdir / "output", batch, options.device, precision)
            about: records.Case = {"model": label(options.model), "tasks": options.tasks, "images": case.images, "batch": batch}
            about["precision"] = precision
            recorder.keep(measure(case, options.workers, options.seconds, about))
    print(f"written: {recorder.path}")


if __name__ == "__main__":
    main()
