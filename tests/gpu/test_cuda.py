"""On a CUDA device: kernels and every method find what they find on a CPU; reading ahead, evaluation and NCCL run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TASKS
from tolerances import direct, eps, forward
from torch import Tensor

from mergekit_vision import MergedCLIP, Trainer, VisionTasks, load
from mergekit_vision.data.proxies import Proxies
from mergekit_vision.evaluation.evaluator import Runtime
from mergekit_vision.functional.eigen import example, on_device, on_host
from mergekit_vision.functional.leading import leading_eigenpairs
from mergekit_vision.functional.linalg import polar, polar_product, top_svd
from mergekit_vision.functional.ties import magnitude_threshold
from mergekit_vision.merger import Merger
from mergekit_vision.merging import workbench
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.task_arithmetic import TaskArithmetic
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.plugins.trim import Breadcrumbs
from mergekit_vision.registry import mergers

CUDA = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

MERGERS = [pytest.param(cls, id=name) for name, cls in mergers().items() if cls.kind != "oracle"]  # which are no merges
LAYERS, WIDTH = 12, 32  # of the tiny tower, at most
AMPLIFIED = 1000
"""How many times more than rounding a method may change a merged weight of the tiny model."""


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def embeddings(images: Tensor, place: Path) -> Tensor:
    """Embeddings by a merged model's directory, on the CPU."""
    with torch.inference_mode():
        return load(place)(images)


@pytest.mark.parametrize("cls", MERGERS)
def test_every_method_merges_what_it_merges_on_a_cpu(cls: type[Merger], tiny_suite: Path, tmp_path: Path) -> None:
    found = []
    for accelerator in ("cpu", "cuda"):
        place = tmp_path / accelerator
        trainer = Trainer(default_root_dir=str(place), accelerator=accelerator, devices=1)
        trainer.merge(MergedCLIP(cls()), VisionTasks(str(tiny_suite), proxies=Proxies(n=6)))
        found.append(embeddings(normal(16, 3, 16, 16), place))
    bound = AMPLIFIED * (forward(LAYERS, WIDTH) + eps())
    assert float((found[1] - found[0]).norm()) <= bound * float(found[0].norm())


@pytest.mark.parametrize("method", ["ESM", "SMILE", "ESMPPBayes"])
def test_a_model_on_the_device_gives_the_same_embeddings(
    method: str, tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    merged = MergedCLIP(mergers()[method]())
    Trainer(default_root_dir=str(tmp_path), accelerator="cpu").merge(merged, VisionTasks(str(tiny_suite)))
    images, model = normal(16, 3, 16, 16), load(tmp_path)
    with torch.inference_mode():
        expected = model(images)
        model.to(CUDA)
        found = model(images.to(CUDA)).cpu()
    assert float((found - expected).norm()) <= 8 * forward(LAYERS, WIDTH) * float(expected.norm())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_evaluation_counts_the_same_images(precision: Any, tiny_suite: Path, tmp_path: Path) -> None:
    results = []
    for accelerator in ("cpu", "cuda"):
        place = tmp_path / accelerator
        trainer = Trainer(default_root_dir=str(place), accelerator=accelerator, devices=1, precision=precision)
        trainer.test(MergedCLIP(mergers()["SMILE"]()), VisionTasks(str(tiny_suite), num_workers=1))
        results.append(json.loads((place / "results.json").read_text())["tasks"])
    assert results[0].keys() == results[1].keys() == TASKS.keys()
    if precision == "32-true":
        assert results[0] == results[1]


@pytest.mark.parametrize("method", [TaskArithmetic(), TIES(), ESM()], ids=lambda method: type(method).__name__)
def test_reading_ahead_changes_nothing(method: Merger, tiny_suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench.open(VisionTasks(str(tiny_suite), proxies=Proxies(n=6)), Runtime(CUDA))
    experts = {task: bench.evaluator.expert(task) for task in TASKS}
    ahead = bench.merge(method, experts)
    monkeypatch.setattr(workbench, "copies_to", lambda device: None)
    plain = bench.merge(method, experts)
    assert ahead.update.keys() == plain.update.keys()
    assert all(torch.equal(ahead.update[key], value) for key, value in plain.update.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigendecompositions_in_both_places(dtype: torch.dtype) -> None:
    G = example(300, dtype).to(CUDA)
    for values, vectors in (on_device(G), on_host(G)):
        assert values.device == vectors.device == CUDA
        assert float((vectors * values @ vectors.T - G).norm()) <= direct(300, 1.0, dtype) * float(G.norm())


def test_leading_eigenpairs() -> None:
    X = normal(700, 600).double()
    G = X.T @ X
    values, vectors = leading_eigenpairs(G.to(CUDA), 40)
    expected = torch.linalg.eigvalsh(G).flip(0)[:40]
    assert float((values.cpu() - expected).abs().max()) <= direct(600, 1.0, torch.float64) * float(expected[0])
    assert vectors.device == CUDA


@pytest.mark.parametrize("shape", [(1100, 1100, 200), (300, 200, 500), (200, 300, 100)])
def test_polar_factors(shape: tuple[int, int, int]) -> None:
    m, p, n = shape
    left, right = normal(m, p), normal(p, n)
    left += 3 * torch.eye(m, p)
    found = polar_product(left.to(CUDA), right.to(CUDA))
    (U, s, Vh), (A, t, Bh) = (torch.linalg.svd(M.double(), full_matrices=False) for M in (left, right))
    condition = float(max(s[0] / s[-1], t[0] / t[-1]))
    expected = U @ Vh @ A @ Bh
    assert found.product.device == CUDA
    assert float((found.product.cpu() - expected).norm()) <= 8 * direct(max(shape), condition) * float(expected.norm())
    assert found.left_mean == pytest.approx(float(s.mean()), rel=direct(p, 1.0))
    assert found.right_mean == pytest.approx(float(t.mean()), rel=direct(p, 1.0))
    assert polar(right.to(CUDA)).factor.device == CUDA


def test_top_svd() -> None:
    M = normal(60, 40)
    found, expected = top_svd(M.to(CUDA), 5), torch.linalg.svd(M.double())
    assert float((found.S.cpu() - expected.S[:5]).abs().max()) <= direct(60, 1.0) * float(expected.S[0])


def test_the_threshold_of_ties_is_the_same_number() -> None:
    base, expert = normal(3_000_001), 0.1 * normal(3_000_001).flip(0)

    def pairs() -> list[tuple[Tensor, Tensor]]:
        return [(base + expert, base)]

    on_cpu = magnitude_threshold(pairs, 0.2)
    assert magnitude_threshold(pairs, 0.2, device=CUDA) == on_cpu


def test_breadcrumbs_keeps_the_same_entries() -> None:
    delta = normal(300, 400).round(decimals=2)  # many are alike
    expected = Breadcrumbs()._masked("a", "w", delta.clone())
    assert Breadcrumbs()._masked("a", "w", delta.to(CUDA)).cpu().equal(expected)


def test_all_devices_with_nccl(tiny_suite: Path, tmp_path: Path) -> None:
    devices = torch.cuda.device_count()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices), "-m", "mergekit_vision"]
    common = ["test", "-s", str(tiny_suite), "-m", "ESM", "--scale", "merger"]
    options = ["--trainer.accelerator", "cuda", "--trainer.strategy", "ddp"]
    results = []
    for name, words in {
        "torchrun": [*launcher, *common, *options, "--devices", str(devices)],
        "auto": ["-m", "mergekit_vision", *common, *options, "--devices", "auto"],
        "cpu": ["-m", "mergekit_vision", *common, "--trainer.accelerator", "cpu"],
    }.items():
        done = subprocess.run(
            [sys.executable, *words, "-o", str(tmp_path / name)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "NCCL_DEBUG": "VERSION"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert ("NCCL version" in done.stdout + done.stderr) == (name != "cpu")
        results.append(json.loads((tmp_path / name / "results.json").read_text())["tasks"])
    assert results[0] == results[1] == results[2]
