"""Fixtures for the tests of merged directories and of exports."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_models import Save, record_at, small_models
from tiny import CONFIG, write_backbone

from mergekit_vision import MergedCLIP, Merger, Trainer, VisionTasks
from mergekit_vision.export.exporting import export_model
from mergekit_vision.export.formats import FORMATS
from mergekit_vision.export.manifest import write_record
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP, ESMPPBayes
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.routers import ExpertDtype

_LAYERS = ("in_proj",)  # graphs of few layers are quick to make

MERGERS: dict[str, Merger] = {
    "ESM": ESM(),
    "ESMPP": ESMPP(rank=4, layers=_LAYERS),
    # of so small a model the tokens have no 32 axes that float32 could tell apart, on which the covariance would be taken
    "ESMPPBayes": ESMPPBayes(rank=4, layers=_LAYERS, pooling=("mean", "deviation", "first")),
    "bfloat16": ESMPPBayes(rank=4, layers=_LAYERS, pooling=("mean", "first")),
    "SMILE": SMILE(rank=4, gate_rank=2, layers=_LAYERS),
    "once": ESMPP(
        rank=4, layers=_LAYERS, rule="sim", statistics="base", pooling=("mean", "first"), decision="once", held_layer=1
    ),
}


@pytest.fixture(scope="session")
def merged(tiny_suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny suite's experts merged by one of the ``MERGERS``, once for all tests: directory of the model."""
    root = tmp_path_factory.mktemp("merged")

    def directory(name: str) -> Path:
        if not (root / name).exists():
            trainer = Trainer(default_root_dir=str(root / name), accelerator="cpu")
            dtype: ExpertDtype = "bfloat16" if name == "bfloat16" else "float32"
            trainer.merge(MergedCLIP(MERGERS[name], scale=0.7, expert_dtype=dtype), VisionTasks(str(tiny_suite)))
        return root / name

    return directory


@pytest.fixture(scope="session")
def exported(merged: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """One of the ``MERGERS``' models in a format, once for all tests: directory of the export."""
    root = tmp_path_factory.mktemp("exported")

    def directory(name: str, to: str) -> Path:
        for package in FORMATS[to].packages:
            pytest.importorskip(package, reason=f"the extra {FORMATS[to].extra} is not installed")
        output = root / f"{name}-{to}"
        if not output.exists():
            export_model(merged(name), to, output)
        return output

    return directory


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., Path]:
    """A random model of another configuration in the place of a merged one; its directory."""

    def directory(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **model: Any) -> Path:
        config = json.loads(json.dumps(CONFIG))
        config["preprocess_cfg"].update(model.pop("preprocess", {}))
        config["model_cfg"]["vision_cfg"].update(vision or {})
        config["model_cfg"]["text_cfg"].update(text or {})
        config["model_cfg"].update(model)
        place = tmp_path / "variant"
        shutil.rmtree(place, ignore_errors=True)
        write_backbone(place, config)
        write_record(place, record_at(1.0))
        return place

    return directory


@pytest.fixture(scope="session")
def save(tiny_suite: Path) -> Save:
    """Writes small merged models; see :func:`small_models`."""
    return small_models(tiny_suite)
