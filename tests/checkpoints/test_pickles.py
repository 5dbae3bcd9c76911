"""Pickled models and archives are read for their tensors; nothing in them is run."""

import argparse
import pickle
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from clip_models import open_clip_tower
from torch import Tensor, nn

from mergekit_vision.checkpoints import open_weights
from mergekit_vision.checkpoints.leaves import leaves
from mergekit_vision.checkpoints.rebuilding import Stub
from mergekit_vision.errors import InputError


class ImageEncoder(nn.Module):
    """As Task Arithmetic pickles it: the whole model, with its preprocessing."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.visual = open_clip_tower()
        self.model.register_buffer("attn_mask", torch.zeros(3, 3), persistent=False)
        self.model.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.train_preprocess = ["anything", {"at": "all"}]


class TaskVector:
    def __init__(self, vector: dict[str, Tensor]) -> None:
        self.vector = vector


class Sizes(NamedTuple):
    width: int


class OwnDict(dict[str, Any]):
    """As Lightning's AttributeDict."""


class OwnOrderedDict(OrderedDict[str, Any]):
    pass


class OwnList(list[Any]):
    pass


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with the classes, which is not there any more when they are read."""
    module = ModuleType("src_modeling")
    for kind in (ImageEncoder, TaskVector):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_is_its_state_dict(tmp_path: Path, gone: ModuleType, zipped: bool) -> None:
    model = ImageEncoder()
    torch.save(model, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    del sys.modules[gone.__name__]
    expert = open_weights(tmp_path / "x.pt")
    expected = {f"visual.{key}": value for key, value in model.model.visual.state_dict().items()}
    assert expert.origin["names"] == "model.visual.*"
    assert sorted(expert) == sorted(expected)
    assert all(torch.equal(expert[key], value) for key, value in expected.items())
    assert gone.__name__ not in sys.modules


def test_a_task_vector_object_is_a_difference(tmp_path: Path, gone: ModuleType) -> None:
    tower = open_clip_tower().state_dict()
    vector = {f"model.visual.{key}": 0.1 * value for key, value in tower.items() if "ln_" not in key}
    torch.save(TaskVector(vector), tmp_path / "x.pt")
    expert = open_weights(tmp_path / "x.pt")
    assert (expert.relative, expert.origin["kind"]) == (True, "delta")
    weights = expert.on({f"visual.{key}": value for key, value in tower.items()})
    for key, value in tower.items():
        assert torch.allclose(weights[f"visual.{key}"], value if "ln_" in key else 1.1 * value, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_torchscript_is_read_without_its_code(tmp_path: Path) -> None:
    class Clip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = open_clip_tower().half()
            self.visual.ln_pre.float()

        def forward(self, x: Tensor) -> Tensor:
            return self.visual(x)

    model = Clip()
    with torch.no_grad():
        traced = torch.jit.trace(model.float(), torch.zeros(1, 3, 16, 16), check_trace=False)
    traced.save(str(tmp_path / "x.pt"))
    expert = open_weights(tmp_path / "x.pt")
    assert expert.origin["container"] == "TorchScript archive"
    expected = traced.state_dict()
    assert sorted(expert) == sorted(key for key in expected if key.startswith("visual."))
    assert all(torch.equal(expert[key], expected[key]) for key in expert)


def test_what_is_nested_deeply_beside_weights_is_left_out(tmp_path: Path) -> None:
    state = {f"visual.{key}": value for key, value in open_clip_tower().state_dict().items()}
    chain = argparse.Namespace(model=state)
    for _ in range(100):
        chain = argparse.Namespace(before=chain, value=3)
    for content in ({"history": chain, "state_dict": state}, {"state_dict": state, "history": chain}):
        torch.save(content, tmp_path / "x.pt")
        expert = open_weights(tmp_path / "x.pt")
        assert expert.origin["names"] == "state_dict.visual.*"
        assert all(torch.equal(expert[key], value) for key, value in state.items())


def test_what_is_in_several_places_has_the_least_deep(tmp_path: Path) -> None:
    """Also where it is met first just above the depth at which it would not be looked into any more."""
    state = {"model": {f"visual.{key}": value for key, value in open_clip_tower().state_dict().items()}}
    for depth in (1, 45, 46, 47, 48):
        history: Any = state
        for _ in range(depth):
            history = {"before": history}
        torch.save({"history": history, "state_dict": state}, tmp_path / "x.pt")
        assert open_weights(tmp_path / "x.pt").origin["names"] == "state_dict.model.visual.*"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_all_protocols_are_read(tmp_path: Path, zipped: bool, protocol: int) -> None:
    state = {f"visual.{key}": value for key, value in open_clip_tower().state_dict().items()}
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    expert = open_weights(tmp_path / "x.pt")
    assert all(torch.equal(expert[key], value) for key, value in state.items())


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "beside", [torch.torch_version.TorchVersion("2.4"), Sizes(3), argparse.Namespace(), OwnDict(lr=1.0), OwnList([1]), object()],
    ids=lambda beside: type(beside).__name__,
)  # fmt: skip
def test_objects_without_attributes_may_lie_beside_weights(tmp_path: Path, beside: object, protocol: int) -> None:
    state = {f"visual.{key}": value for key, value in open_clip_tower().state_dict().items()}
    torch.save({"state_dict": state, "x": beside}, tmp_path / "x.pt", pickle_protocol=protocol)
    assert open_weights(tmp_path / "x.pt").shapes == {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("attributes", [{}, {"_metadata": {"visual": {"version": 1}}}])
@pytest.mark.parametrize("kind", [OwnDict, OwnOrderedDict, Counter])
def test_state_dictionaries_of_any_class_are_read(tmp_path: Path, kind: type[Any], attributes: dict[str, Any]) -> None:
    state = kind({f"visual.{key}": value for key, value in open_clip_tower().state_dict().items()})
    vars(state).update(attributes)
    for content in (state, {"model": state}, [state]):
        torch.save(content, tmp_path / "x.pt")
        expert = open_weights(tmp_path / "x.pt")
        assert sorted(expert) == sorted(state)
        assert all(torch.equal(expert[key], value) for key, value in state.items())


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["beside", "inside", "instead"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool, place: str) -> None:
    evil, marker = Malicious(tmp_path / "marker"), tmp_path / "marker"
    state: dict[str, Any] = {f"visual.{key}": value for key, value in open_clip_tower().state_dict().items()}
    content = {
        "beside": {"state_dict": state, "hyper_parameters": {"callback": evil}},
        "inside": {**state, "visual.proj": evil},
        "instead": evil,
    }[place]
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    if place == "beside":
        assert len(open_weights(tmp_path / "x.pt")) == len(state)
    else:
        with pytest.raises(InputError, match="not a plain tensor" if place == "inside" else "holds no tensors"):
            open_weights(tmp_path / "x.pt")
    assert not marker.exists()
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert marker.exists()  # others would have run it


def written(path: Path, data: bytes) -> Path:
    """An archive as torch.save makes it, with any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/data/0", b"\0" * 16)
        archive.writestr("x/version", b"3\n")
    return path


def test_what_a_pickle_is_given_cannot_be_changed_for_others(tmp_path: Path) -> None:
    """A pickle may set attributes of functions that it gets; here by the state of a BUILD instruction."""
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    attack = function + b"(N}X\x0c\x00\x00\x00__defaults__N\x73t" + b"b."
    with pytest.raises(InputError):
        open_weights(written(tmp_path / "x.pt", attack))
    assert torch._utils._rebuild_tensor_v2.__defaults__ is not None
    torch.save({f"visual.{key}": value for key, value in open_clip_tower().state_dict().items()}, tmp_path / "y.pt")
    assert open_weights(tmp_path / "y.pt").shapes


class Storage:
    def __init__(self, elements: int) -> None:
        self.elements = elements


class Claiming(pickle.Pickler):
    """Pickles a tensor with any offset, sizes and strides over a storage of four floats."""

    def persistent_id(self, obj: object) -> Any:
        return ("storage", torch.FloatStorage, "0", "cpu", obj.elements) if isinstance(obj, Storage) else None

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, Claim):
            return torch._utils._rebuild_tensor_v2, (Storage(4), *obj.shape, False, OrderedDict())
        return NotImplemented


class Claim:
    def __init__(self, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.shape = (offset, size, stride)


@pytest.mark.parametrize(
    "claim", [Claim(0, (1, 3, 9, 9), (1, 1, 1, 1)), Claim(-4, (1, 3, 1, 1), (1, 1, 1, 1)), Claim(0, (1, 3, 1, 1), (1, -1, 1, 1)),
              Claim(1 << 62, (1, 3, 1, 1), (1, 1, 1, 1)), Claim(0, (1, 3, 1 << 40, 1 << 40), (0, 0, 0, 0))]
)  # fmt: skip
def test_tensors_that_reach_beyond_their_storage_are_refused(tmp_path: Path, claim: Claim) -> None:
    import io

    stream = io.BytesIO()
    Claiming(stream, protocol=2).dump({"visual.conv1.weight": claim})
    with pytest.raises(InputError, match=r"x\.pt: "):
        open_weights(written(tmp_path / "x.pt", stream.getvalue()))


DAMAGED = [b"", b".", b"\x80\x02.", b"\x80\x05]\x94h\x00a.", b"(" * 10**6, b"\x80\x02" + b"]" * 10**5 + b"a" * 10**5 + b"."]


@pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_pickles_are_named(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InputError, match=r"x\.pt: "):
        open_weights(written(tmp_path / "x.pt", data))


def test_objects_that_contain_each_other_end(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"proj": "a tensor"}
    for _ in range(40):  # as text it would be of 2 ** 40 entries
        shared = {"a": shared, "b": shared}
    assert len(list(leaves(shared))) == 1
    attributes = {str(number): number for number in range(10**4)}
    objects = [Stub() for _ in range(10**4)]
    for item in objects:
        item.state = attributes
    assert len(list(leaves({str(number): item for number, item in enumerate(objects)}))) == len(attributes)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({f"visual.{key}": value for key, value in open_clip_tower().state_dict().items()}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as source, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    with pytest.raises(InputError, match="its records are compressed"):
        open_weights(tmp_path / "y.pt")


@pytest.mark.parametrize("kind", ["int8", "bool", "int64", "float8_e4m3fn", "complex64", "sparse", "meta", "quantized"])
def test_only_plain_floating_point_is_taken(tmp_path: Path, kind: str) -> None:
    state = {f"visual.{key}": value for key, value in open_clip_tower().state_dict().items()}
    proj = state["visual.proj"]
    if kind == "sparse":
        state["visual.proj"] = proj.to_sparse()
    elif kind == "quantized":
        state["visual.proj"] = torch.quantize_per_tensor(proj, 0.1, 0, torch.qint8)
    else:
        state["visual.proj"] = proj.to("meta") if kind == "meta" else proj.to(getattr(torch, kind))
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"visual\.proj is (stored as|not a plain tensor)"):
        open_weights(tmp_path / "x.pt")
