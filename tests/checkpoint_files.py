"""Checkpoints written byte by byte, sound and hostile."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from clip_models import SIZES, open_clip_tower
from safetensors.torch import save_file
from torch import Tensor

from mergekit_vision.checkpoints import ExpertSource

Make = Callable[[Path], Path | ExpertSource]
"""Writes a checkpoint into a directory and says where it is."""

TOWER = {key: value.clone() for key, value in open_clip_tower().state_dict().items()}
BASE = {f"visual.{key}": value for key, value in TOWER.items()}
WIDTH = SIZES["width"]
TEXT = {
    "positional_embedding": torch.zeros(12, WIDTH),
    "text_projection": torch.zeros(WIDTH, 24),
    "logit_scale": torch.tensor(1.0),
    "token_embedding.weight": torch.zeros(50, WIDTH),
    "ln_final.weight": torch.ones(WIDTH),
    "ln_final.bias": torch.zeros(WIDTH),
    **{key: value for key, value in TOWER.items() if key.startswith("transformer.")},
}
"""A text tower as wide as the vision tower, at the top level."""

FULL = {**{f"visual.{key}": value for key, value in TOWER.items()}, **TEXT}

_PATCH = struct.pack("<12f", *range(12))
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
"""What begins a file of torch.save from before PyTorch 1.6."""


def named(prefix: str, tower: Mapping[str, Tensor] = TOWER) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tower.items()}


def short(key: str) -> bytes:
    """The opcode of a short text."""
    return b"X" + struct.pack("<I", len(key)) + key.encode()


def saved(content: object, legacy: bool = False, **options: Any) -> Make:
    """By torch.save."""

    def make(place: Path) -> ExpertSource:
        torch.save(content, place / "x.pt", _use_new_zipfile_serialization=not legacy)
        return ExpertSource(place / "x.pt", **options)

    return make


def raw(content: bytes, name: str = "x.pt") -> Make:
    def make(place: Path) -> Path:
        (place / name).write_bytes(content)
        return place / name

    return make


def zipped(data: bytes, *more: tuple[str, bytes], compression: int = zipfile.ZIP_STORED, patch: bytes = _PATCH) -> bytes:
    """An archive as torch.save makes it, with any pickle; a patch embedding is its one storage."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in (("x/data.pkl", data), ("x/data/0", patch), *more):
            archive.writestr(name, content)
    return stream.getvalue()


def opcodes(body: bytes, protocol: int = 2) -> Make:
    """An archive with the instructions of a pickle."""
    return raw(zipped(b"\x80" + bytes([protocol]) + body + b"."))


def tensor(
    size: str = "(K\x01K\x03K\x02K\x02t",
    stride: str = "(K\x0cK\x04K\x02K\x01t",
    offset: bytes = b"K\x00",
    key: bytes = short("0"),
    kind: bytes = b"ctorch\nFloatStorage\n",
) -> bytes:
    """Instructions that rebuild a tensor of the one storage, given as those of its sizes, strides, offset, and storage."""
    storage = b"(" + short("storage") + kind + key + short("cpu") + b"K\x0ctQ"
    return _REBUILD + b"(" + storage + offset + size.encode() + stride.encode() + b"\x89}tR"


def patch_of(value: bytes, body: bytes = b"") -> bytes:
    """Instructions of a state dictionary with a patch embedding, after others whose result is thrown away."""
    return body + b"}" + short("visual.conv1.weight") + value + b"s"


def header(content: object, data: bytes = b"", length: int | None = None) -> Make:
    """A safetensors file of any header."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return raw(struct.pack("<Q", len(text) if length is None else length) + text + data, "x.safetensors")


def patch_header(dtype: str = "F32", shape: tuple[int, ...] = (1, 3, 2, 2), span: tuple[int, int] = (0, 48)) -> dict[str, Any]:
    return {"visual.conv1.weight": {"dtype": dtype, "shape": shape, "data_offsets": span}}


def directory(files: Mapping[str, object], **options: Any) -> Make:
    """A directory of files: tensors, bytes, or what is written as JSON."""

    def make(place: Path) -> ExpertSource:
        for name, content in files.items():
            if name.endswith(".json") and not isinstance(content, bytes):
                (place / name).write_text(json.dumps(content))
            elif isinstance(content, bytes):
                (place / name).write_bytes(content)
            elif name.endswith(".safetensors"):
                save_file(dict(content), place / name)  # type: ignore[call-overload]
            else:
                torch.save(content, place / name)
        return ExpertSource(place, **options)

    return make


_HUGGINGFACE = {
    "class_embedding": "embeddings.class_embedding",
    "conv1": "embeddings.patch_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def huggingface(prefix: str = "vision_model.", projection: str | None = "visual_projection.weight") -> dict[str, Tensor]:
    """The tower under the names of transformers."""
    found = {}
    for key, value in TOWER.items():
        if key == "proj":
            continue
        name = key
        for own, other in _HUGGINGFACE.items():
            name = name.replace(own, other)
        if ".attn.in_proj_" in name:
            parts = zip("qkv", value.chunk(3), strict=True)
            found |= {prefix + name.replace("attn.in_proj_", f"self_attn.{letter}_proj."): part.clone() for letter, part in parts}
        else:
            found[prefix + name] = value
    return found if projection is None else {**found, projection: TOWER["proj"].T.contiguous()}


def lora(module: str, rank: int = 2, adapter: str = "", out: int = WIDTH) -> dict[str, Tensor]:
    """The two factors of a layer."""
    return {
        f"{module}.lora_A{adapter}.weight": torch.ones(rank, WIDTH),
        f"{module}.lora_B{adapter}.weight": torch.ones(out, rank),
    }


def adapter(tensors: Mapping[str, Tensor], **config: Any) -> Make:
    """A directory of peft."""
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    return directory({"adapter_model.safetensors": tensors, "adapter_config.json": told})


def clip_lora(layers: int = 1, parts: tuple[str, ...] = ("q_proj", "v_proj"), rank: int = 2, **metadata: Any) -> Make:
    """A file of CLIP-LoRA."""
    down, up = torch.ones(rank, WIDTH), torch.ones(WIDTH, rank)
    told = {"r": 2, "alpha": 1, "encoder": "vision", "params": ["q", "v"], "position": "all", **metadata}
    return saved(
        {
            "weights": {
                f"layer_{index}": {part: {"w_lora_A": down, "w_lora_B": up} for part in parts} for index in range(layers)
            },
            "metadata": told,
        }
    )
