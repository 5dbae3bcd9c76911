"""CPU time and error of the polar factors that ESM needs, by what finds them.

    python -m benchmarks.polar        # the first block of ViT-B-32, T = 8

What is factored are the weighted directions of all tasks, side by side, of the layers that have more outputs than inputs. The
merge needs the factor times its other one, and the mean of the singular values. Errors are relative Frobenius norms, against an
SVD in float64.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.experts import label, prepare, tower
from benchmarks.machine import Recorder
from benchmarks.meter import Stopwatch
from benchmarks.records import Row
from benchmarks.textbook import Textbook, load, polar, side_by_side
from mergekit_vision.functional.linalg import polar as gram_polar
from mergekit_vision.functional.polar_columns import polar_columns

CPU = torch.device("cpu")
LAYERS = {"in_proj": "attn.in_proj_weight", "c_fc": "mlp.c_fc.weight"}
Found = tuple[Tensor, float] | None
"""The factor times the columns, and the sum of the singular values; ``None`` of a matrix that a kernel is not for."""


def by_gram(E: Tensor, Z: Tensor) -> Found:
    """An eigendecomposition of the Gram matrix in float64, as the package does for small matrices."""
    found = gram_polar(E)
    return found.factor @ Z, found.nuclear_norm


def by_band(E: Tensor, Z: Tensor) -> Found:
    """The band form, and partial fractions of it, as the package does for large matrices."""
    found = polar_columns(E, Z)
    return None if found is None else (found.product, found.nuclear_norm)


def by_svd(E: Tensor, Z: Tensor) -> Found:
    """An SVD in the precision of the matrix."""
    U, S, Vh = torch.linalg.svd(E)
    return U @ (Vh @ Z), float(S.sum(dtype=torch.float64))


KERNELS: dict[str, Callable[[Tensor, Tensor], Found]] = {"Gram matrix": by_gram, "band": by_band, "SVD": by_svd}


def matrices(workdir: Path, model: str, tasks: int, proxies: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Layer, its directions, and the polar factor of its coordinates; of the first block."""
    files, visual = prepare(workdir, model, 1, tasks, proxies), tower(model, 1)
    book = Textbook(load(files.base), [load(path) for path in files.experts], CPU, torch.float32)
    stopwatch = Stopwatch(CPU)
    spectra = [book.spectra(visual, task, load(path)["images"], stopwatch) for task, path in enumerate(files.images)]
    for name, suffix in LAYERS.items():
        key = f"visual.transformer.resblocks.0.{suffix}"
        E, C = side_by_side([vector[key] for vector in book.vectors], [spectrum[key] for spectrum in spectra])
        yield name, E, polar(C.double())[0].float()


def measure(E: Tensor, Z: Tensor, repeats: int, about: records.Case) -> Iterator[Row]:
    """A row for each kernel that takes the matrix."""
    exact = by_svd(E.double(), Z.double())
    assert exact is not None
    for name, kernel in KERNELS.items():
        found, seconds = None, []
        for _ in range(repeats):
            start = time.process_time()
            found = kernel(E, Z)
            seconds.append(time.process_time() - start)
        if found is None:
            continue
        error = float((found[0].double() - exact[0]).norm() / exact[0].norm())
        samples = {"cpu_seconds": seconds, "error": [error], "norm_error": [abs(found[1] / exact[1] - 1)]}
        yield Row.of({**about, "side": len(E), "by": name}, samples)


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Measure, print and keep the rows."""
    parser = records.parser("polar", __doc__)
    parser.add_argument("--model", default="ViT-B-32", help="open_clip name; its shapes are used")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--proxies", type=int, default=32, help="images a task")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recorder = Recorder("polar", options.results)
    about: records.Case = {"model": label(options.model), "tasks": options.tasks, "proxies": options.proxies}
    for layer, E, Z in matrices(options.workdir.resolve(), options.model, options.tasks, options.proxies):
        recorder.keep(measure(E, Z, options.repeats, {**about, "layer": layer}))
    print(f"written: {recorder.path}")


if __name__ == "__main__":
    main()
