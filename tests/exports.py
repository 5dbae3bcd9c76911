"""Exported image encoders, loaded as someone without this package does."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

Embed = Callable[[Tensor], Tensor]


@contextmanager
def without_this_package(*others: str) -> Iterator[None]:
    """Nothing of this package can be imported, nor of ``others``, while the context is open."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(sys.modules):
            if name.partition(".")[0] in ("mergekit_vision", *others):
                patch.setitem(sys.modules, name, None)
        yield


def by_transformers(directory: Path) -> Embed:
    transformers = pytest.importorskip("transformers")
    encoder = transformers.CLIPVisionModelWithProjection.from_pretrained(directory).eval()
    return lambda images: encoder(pixel_values=images).image_embeds


def by_open_clip(directory: Path) -> Embed:
    import open_clip

    return open_clip.create_model(f"local-dir:{directory}").eval().encode_image


def by_onnxruntime(directory: Path) -> Embed:
    session = pytest.importorskip("onnxruntime").InferenceSession(directory / "model.onnx")
    return lambda images: torch.from_numpy(session.run(None, {"pixels": images.numpy()})[0])


def by_torch(directory: Path) -> Embed:
    return torch.export.load(directory / "model.pt2").module()


READERS = {"huggingface": by_transformers, "open_clip": by_open_clip, "onnx": by_onnxruntime, "torch": by_torch}
