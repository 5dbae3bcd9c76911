"""The ONNX graph as its own tools see it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergekit_vision.export.merged import open_merged
from mergekit_vision.export.onnx_graph import Onnx

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")


def test_the_graph_is_valid_and_its_batch_has_any_size(exported: Callable[[str, str], Path]) -> None:
    file = exported("SMILE", "onnx") / "model.onnx"
    onnx.checker.check_model(file, full_check=True)
    model = onnx.load(file)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    ends = {end.name: end.type.tensor_type for end in (*model.graph.input, *model.graph.output)}
    shapes = {name: [size.dim_param or size.dim_value for size in kind.shape.dim] for name, kind in ends.items()}
    assert shapes == {"pixels": ["batch", 3, 16, 16], "embeddings": ["batch", 32]}
    assert {kind.elem_type for kind in ends.values()} == {onnx.TensorProto.FLOAT}
    for place in (Path(__file__).parents[2], Path(torch.__file__).parent):
        assert str(place).encode() not in file.read_bytes(), "a path of this machine"


def test_older_pytorch_is_refused(merged: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_merged(merged("ESM"), {}, {})
    assert Onnx().faults(model) == []
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    assert Onnx().faults(model) == ["onnx needs PyTorch 2.6 or newer, not 2.5.1"]
