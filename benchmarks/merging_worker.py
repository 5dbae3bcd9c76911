"""One merge in a process of its own, from checkpoints on disk to the merged model on disk; see :mod:`benchmarks.merging`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.experts import Files, tower, whole
from benchmarks.meter import Meter, Stopwatch
from benchmarks.textbook import Textbook, load
from mergekit_vision.checkpoints import save_safetensors
from mergekit_vision.encoders.hooks import capture_inputs
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.merger import Merged, MergeInputs, Observer, Spread, Weights, merged_weights
from mergekit_vision.merging.streaming import copies_to, read_ahead
from mergekit_vision.registry import get
from mergekit_vision.support.team import ALONE

METHODS = ("ESM", "TSVM", "TIES", "IsoC")


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        model: open_clip name, whose shapes the files have.
        layers: number of transformer blocks of the files.
        method: one of :data:`METHODS`.
        implementation: ``"ours"`` or ``"textbook"``.
        base, experts, images: input files.
        double: textbook in float64.
        device: torch device.
        limit_gib: anonymous memory at which the process gives up.
    """

    model: str
    layers: int
    method: str
    implementation: str
    base: str
    experts: tuple[str, ...]
    images: tuple[str, ...]
    double: bool = False
    device: str = "cpu"
    limit_gib: float | None = None

    @classmethod
    def of(cls, files: Files, **fields: Any) -> "Case":
        """A case on prepared files."""
        experts, images = (tuple(map(str, paths)) for paths in (files.experts, files.images))
        return cls(base=str(files.base), experts=experts, images=images, **fields)

    @property
    def output(self) -> Path:
        """Where the merged model goes: beside the inputs, the first one's images telling how many there are of each."""
        bits, proxies = 64 if self.double else 32, Path(self.images[0]).stem.rpartition("-")[2]
        name = f"merged-{self.method}-{len(self.experts)}-tasks-{proxies}-proxies-{self.implementation}-float{bits}"
        return Path(self.base).with_name(f"{name}.safetensors")

    def to_json(self) -> str:
        """The case as one argument of a command line."""
        return json.dumps(asdict(self))


def work(argument: str) -> dict[str, float]:
    """Run a case that :meth:`Case.to_json` wrote, and measure it."""
    case = Case(**json.loads(argument))
    device = torch.device(case.device)
    visual = tower(case.model, case.layers)
    torch.backends.cudnn.allow_tf32 = False  # as a Trainer does: float32 is float32 in convolutions too
    forward, meter = Stopwatch(device), Meter(device, case.limit_gib)
    run = ours if case.implementation == "ours" else textbook
    with torch.no_grad(), meter:
        save_safetensors(case.output, run(case, visual, forward))
    return {**meter.row, **({"forward_seconds": round(forward.seconds, 3)} if forward.seconds else {})}


def ours(case: Case, visual: nn.Module, forward: Stopwatch) -> Mapping[str, Tensor]:
    """The merged weights by the package's merger, on files that are read as they are needed."""
    device, base = torch.device(case.device), whole(case.base)
    visual.load_state_dict({key.removeprefix("visual."): base[key] for key in base}, assign=True)
    encoder = VisionEncoder(visual).to(device)
    experts: Mapping[str, Weights] = {path: whole(path) for path in case.experts}
    images = dict(zip(case.experts, case.images, strict=True))
    share: Spread = partial(ALONE.spread, device=device)
    if (copies := copies_to(device)) is not None:
        base = {key: value.to(device) for key, value in base.items()}
        experts, share = read_ahead(experts, base, ALONE, share, copies)

    def run_proxies(task: str, observers: Mapping[str, Observer], model: Merged | None) -> None:
        encoder.assign(experts[task])
        batch = load_images(images[task]).to(device)
        with forward.running(), capture_inputs(encoder, {name: timed(observer, forward) for name, observer in observers.items()}):
            encoder(batch)

    inputs = MergeInputs(base, experts, encoder.linears, device, run_proxies, share=share)
    return merged_weights(base, get(case.method)().merge(inputs), release=True)


def timed(observer: Observer, forward: Stopwatch) -> Observer:
    """An observer whose own time does not count as the forward pass's."""

    def observe(x: Tensor) -> None:
        with forward.paused():
            observer(x)

    return observe


def textbook(case: Case, visual: nn.Module, forward: Stopwatch) -> Mapping[str, Tensor]:
    """The merged weights as the published scripts compute them."""
    dtype = torch.float64 if case.double else torch.float32
    experts = [load(Path(path)) for path in case.experts]
    book = Textbook(load(Path(case.base)), experts, torch.device(case.device), dtype)
    if case.method == "ESM":
        return book.esm(visual, [load_images(path) for path in case.images], forward)
    return {"TSVM": book.tsvm, "TIES": book.ties, "IsoC": book.iso_c}[case.method]()


def load_images(path: str) -> Tensor:
    """One task's proxy images."""
    return load(Path(path))["images"]


def errors(case: Case, reference: Path) -> dict[str, float]:
    """Relative Frobenius errors of a case's merged model.

    Returns:
        ``error`` of all merged weights together, and ``update_error``, the worst matrix's relative to how far merging moved it.
    """
    base, found, exact = whole(case.base), whole(case.output), whole(reference)
    off = norm = worst = 0.0
    for key in exact:
        expected = exact[key].double()
        difference = float((found[key].double() - expected).norm())
        off, norm = off + difference**2, norm + float(expected.norm()) ** 2
        moved = float((expected - base[key].double()).norm())
        if expected.dim() == 2 and moved > 0:
            worst = max(worst, difference / moved)
    return {"error": (off / norm) ** 0.5, "update_error": worst}
