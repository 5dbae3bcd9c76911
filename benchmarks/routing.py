"""Images per second of dynamic encoders beside the plain one, and the memory that experts add.

    python -m benchmarks.routing                                  # ViT-B-32 and ViT-B-16, T = 8 and 20, batches 1, 32, 128
    python -m benchmarks.routing --models ViT-B-32 --batches 32 --device cuda --compile

Weights are random; the cost does not depend on them. All variants of a case take turns, round by round, so that a slow moment of
the machine falls on all of them; a ratio is the median over rounds of (variant / plain encoder) within a round. On a busy machine
the ratio of processor times, at one thread, tells more: it counts this process alone.
"""

import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor

from benchmarks import records
from benchmarks.experts import label
from benchmarks.machine import Recorder
from benchmarks.meter import Cost
from benchmarks.records import Row
from mergekit_vision.encoders.vision import VisionEncoder
from mergekit_vision.functional.routing import Axes, Pooling, pool_tokens
from mergekit_vision.merger import LinearKind, linears_of_kind
from mergekit_vision.routers import (
    CosineRouter,
    Evidence,
    ExpertDtype,
    HeldRouter,
    LinearRouter,
    LowRankExperts,
    ProjectionRouter,
    Router,
)

ALL_KINDS: tuple[LinearKind, ...] = ("in_proj", "out_proj", "c_fc", "c_proj")
TOKEN_STATISTICS: tuple[Pooling, ...] = ("mean", "deviation", "first", "covariance")  # of ESMPPBayes
AXES = 32
DOUBT = 2000.0
"""Temperature at which random discriminants are in doubt, so that every image really mixes two experts: the dearest case."""


def cosine(tasks: int, width: int) -> Router:
    """ESM++'s published router."""
    return CosineRouter(torch.randn(tasks, width))


def bayes(tasks: int, width: int) -> Router:
    """ESMPPBayes' router."""
    axes = Axes(torch.randn(width, AXES), torch.randn(AXES))
    features = pool_tokens(torch.randn(1, 2, width), TOKEN_STATISTICS, axes).shape[-1]
    weight, bias = torch.randn(tasks, features), torch.randn(tasks)
    return LinearRouter(weight, bias, TOKEN_STATISTICS, axes.basis, axes.offset, top_k=2, temperature=DOUBT)


def projection(tasks: int, width: int) -> Router:
    """SMILE's router, of gate rank 16."""
    return ProjectionRouter(torch.randn(tasks, 16, width))


class Variant(NamedTuple):
    """Routed layers, the rank of their experts, their router, whether the last ``c_fc`` decides for all in a run ahead, dtype."""

    kinds: tuple[LinearKind, ...]
    rank: int
    router: Callable[[int, int], Router]
    once: bool = False
    dtype: ExpertDtype = "float32"


VARIANTS = {
    "ESM++ r=8": Variant(("in_proj", "c_fc"), 8, cosine),
    "ESM++ r=32": Variant(("in_proj", "c_fc"), 32, cosine),
    "ESM++ r=32 bfloat16": Variant(("in_proj", "c_fc"), 32, cosine, dtype="bfloat16"),
    "ESMPPBayes r=32": Variant(("in_proj", "c_fc"), 32, bayes),
    "ESMPPBayes r=32 bfloat16": Variant(("in_proj", "c_fc"), 32, bayes, dtype="bfloat16"),
    "ESMPPFit r=18": Variant(ALL_KINDS, 18, bayes, once=True),
    "SMILE r=32 g=16": Variant(ALL_KINDS, 32, projection),
    "SMILE r=32 g=16 bfloat16": Variant(ALL_KINDS, 32, projection, dtype="bfloat16"),
}


def routed(plain: VisionEncoder, tasks: int, variant: Variant) -> VisionEncoder:
    """The encoder with random experts; the plain weights are shared."""
    memo = {id(parameter): parameter for parameter in plain.parameters()}
    encoder = copy.deepcopy(plain, memo)
    experts = {}
    linears = linears_of_kind(encoder.linears, variant.kinds)
    deciding = [linear for linear in linears if linear.kind == "c_fc"][-1]
    for linear in linears:
        d_out, d_in = encoder.get_parameter(f"{linear.name}.weight").shape
        up, down = torch.randn(tasks, d_out, variant.rank) / 100, torch.randn(tasks, variant.rank, d_in) / 100
        bias = torch.zeros(tasks, d_out) if variant.router is projection else None
        evidence: Evidence = "own" if not variant.once else "ahead" if linear is deciding else "hold"
        router = HeldRouter(tasks, top_k=2, temperature=DOUBT) if evidence == "hold" else variant.router(tasks, d_in)
        experts[linear.name] = LowRankExperts(up, down, router, bias, evidence).rounded(variant.dtype)
    encoder.route(experts)
    return encoder.eval()


def compiled(encoder: VisionEncoder, backend: str | Callable[..., Any] = "inductor") -> Callable[[Tensor], Tensor]:
    """The encoder compiled to one graph for each shape of its input; where that cannot be, the first call fails.

    Encoders of one class share their code, and of one code torch keeps few compiled versions, runs what comes after them
    uncompiled, and looks through all of them at each call. Here each has a code of its own.
    """

    def run(images: Tensor) -> Tensor:
        embeddings: Tensor = encoder(images)
        return embeddings

    own = FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)


def added_megabytes(encoder: VisionEncoder) -> float:
    """Size of everything that routing adds to the plain encoder."""
    return sum(buffer.numel() * buffer.element_size() for buffer in encoder.buffers()) / 2**20


def cost(run: Callable[[], Any], device: torch.device) -> Cost:
    """Time of one call, the device's work included."""
    start = Cost.now()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Cost.now().since(start)


@torch.inference_mode()
def measure(plain: VisionEncoder, tasks: int, images: Tensor, budget: float, fast: bool, about: records.Case) -> Iterator[Row]:
    """Rows of one case: every variant in turns until the time is up, three rounds at least."""
    encoders = {"plain encoder": plain, **{name: routed(plain, tasks, variant) for name, variant in VARIANTS.items()}}
    added = {name: added_megabytes(encoder) for name, encoder in encoders.items()}
    runs: dict[str, Callable[[], Any]] = {}
    for name, encoder in encoders.items():
        encoder.to(images.device)
        runs[name] = partial(compiled(encoder) if fast else encoder, images)
        runs[name]()
    plain_mb = sum(parameter.numel() * parameter.element_size() for parameter in plain.parameters()) / 2**20
    runs[f"all {tasks} experts"] = lambda: [runs["plain encoder"]() for _ in range(tasks)]
    added[f"all {tasks} experts"] = (tasks - 1) * plain_mb
    rounds: list[dict[str, Cost]] = []
    start = time.perf_counter()
    while len(rounds) < 3 or time.perf_counter() - start < budget:
        # by construction T plain passes: once is enough to show it
        turn = [name for name in runs if not (rounds and name.startswith("all"))]
        rounds.append({name: cost(runs[name], images.device) for name in turn})
    for name in runs:
        pairs = [(took[name], took["plain encoder"]) for took in rounds if name in took]
        samples = {
            "images_per_second": [len(images) / own.wall for own, _ in pairs],
            "slowdown": [own.wall / base.wall for own, base in pairs],
            "cpu_slowdown": [own.cpu / base.cpu for own, base in pairs],
            "added_MiB": [added[name]],
        }
        yield Row.of({**about, "tasks": tasks, "batch": len(images), "variant": name}, samples)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep the rows."""
    parser = records.parser("routing", __doc__)
    parser.add_argument("--models", nargs="+", default=["ViT-B-32", "ViT-B-16"], help="open_clip names; their shapes are used")
    parser.add_argument("--tasks", nargs="+", type=int, default=[8, 20])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 128])
    parser.add_argument("--seconds", type=float, default=10.0, help="time of one case, three rounds at least")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile every variant")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device, recorder = torch.device(options.device), Recorder("routing", options.results, options.device)
    for model in options.models:
        visual = open_clip.create_model(model, load_weights=False).visual
        plain, size = VisionEncoder(visual).eval().requires_grad_(False), visual.image_size
        for batch in options.batches:
            images = torch.randn(batch, 3, *size, device=device)
            for tasks in options.tasks:
                about: records.Case = {"model": label(model), **({"compiled": "yes"} if options.compile else {})}
                recorder.keep(measure(plain, tasks, images, options.seconds, options.compile, about))
    print(f"written: {recorder.path}")


if __name__ == "__main__":
    main()
