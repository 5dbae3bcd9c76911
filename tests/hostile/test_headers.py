"""Any header, any instructions and any bytes of a checkpoint: an expert, or one message that names the file."""

import json
from pathlib import Path

import pytest
from checkpoint_files import FULL, Make, header, named, opcodes, raw, saved, short, tensor
from hostile.contents import spliced
from hostile.test_checkpoints import SOUND, outcome
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from mergekit_vision.checkpoints import ExpertSource

SIZES = st.integers(-1, 5) | st.sampled_from([1 << 31, 1 << 62, 1 << 64])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I8", "BOOL", "F8_E4M3", "", None, 1]),
        "shape": st.lists(SIZES, max_size=5) | st.none(),
        "data_offsets": st.lists(SIZES | st.sampled_from([48, 96]), max_size=3) | st.none(),
        "more": st.none(),
    },
)
NAMES = st.sampled_from(["visual.conv1.weight", "visual.proj", "__metadata__", "", "a\0b", "\x1b[2J"]) | st.text(max_size=4)
HEADERS = st.dictionaries(NAMES, ENTRIES | st.none() | st.lists(st.none(), max_size=2), max_size=4)

INSTRUCTIONS = [
    *(bytes([code]) for code in b"().0125NQRabdeloqstu]}"),
    *(b"\x81", b"\x85", b"\x86", b"\x87", b"\x88", b"\x8f", b"\x90", b"\x91", b"\x93", b"\x94"),
    *(b"q\x00", b"h\x00", b"j\x00\x00\x00\x00", b"K\x01", b"M\x00\x01", b"G" + b"\x40" * 8, b"C\x02ab", b"I3\n", b"Lx\n"),
    *map(short, ("visual.conv1.weight", "touch ran", "os", "system", "storage", "0")),
    *(b"cos\nsystem\n", b"iposix\nsystem\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n"),
    tensor(),
]
"""Of a pickle."""


def check(path: Path) -> None:
    """Look at a checkpoint, which must be an expert or one message, and write nothing."""
    before = set(path.parent.iterdir())
    found = outcome(ExpertSource(path))
    assert found == SOUND or found.startswith(str(path))
    assert len(found) < 1500
    assert set(path.parent.iterdir()) == before


@given(content=HEADERS.map(json.dumps).map(str.encode) | st.binary(max_size=40), data=st.binary(max_size=100))
def test_any_header_of_safetensors(tmp_path: Path, content: bytes, data: bytes) -> None:
    header(content, data)(tmp_path)
    check(tmp_path / "x.safetensors")


@given(body=st.lists(st.sampled_from(INSTRUCTIONS), max_size=30).map(b"".join))
def test_any_instructions_of_a_pickle(tmp_path: Path, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    opcodes(body)(tmp_path)
    check(tmp_path / "x.pt")


EXPERTS: dict[str, Make] = {
    "safetensors": raw(save(named("visual.")), "x.safetensors"),
    "zip": saved(FULL),
    "legacy": saved(FULL, legacy=True),
}


@pytest.mark.parametrize("kind", EXPERTS)
@given(data=st.data())
def test_a_checkpoint_with_any_bytes_changed(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """At its beginning and its end, where its tensors are described."""
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    EXPERTS[kind](tmp_path)
    whole, near = path.read_bytes(), 1 << 13
    assert len(whole) > near
    path.write_bytes(data.draw(spliced(whole, end=near) | spliced(whole, start=len(whole) - near)))
    check(path)
