"""Several processes of which one fails: all end soon, with one message, and none stays behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergekit_vision import MergedCLIP, Trainer, VisionTasks
from mergekit_vision.plugins.average import Average

LONG = 600  # seconds that a process which nobody ends goes on
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "-m", "mergekit_vision")

METHOD = """
import hashlib, os, signal, time
from pathlib import Path
from mergekit_vision.plugins.average import Average
class {name}(Average):
    def merge(self, inputs):
        if os.environ["LOCAL_RANK"] == "{rank}":
            Path("killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        {then}
        return super().merge(inputs)
"""


def spoil(path: Path, row: int) -> None:
    """Damage one image of a Parquet file."""
    table = pq.read_table(path)
    cells, position = table["image"].to_pylist(), table.schema.get_field_index("image")
    cells[row] = {"bytes": b"not an image", "path": None}
    field = table.schema.field("image")
    pq.write_table(table.set_column(position, field, pa.array(cells, field.type)), path)


def run_as(
    processes: int, command: str, root: Path, *options: str, launcher: tuple[str, ...] = ("-m", "mergekit_vision")
) -> tuple[int, str]:
    """Run a command as some processes; its status and what it says on standard error, once all of them have ended."""
    if launcher == TORCHRUN:
        launcher = (*TORCHRUN[:3], "--nproc-per-node", str(processes), *TORCHRUN[3:])
    devices = ["--trainer.accelerator", "cpu", "--devices", str(processes)]
    arguments = [command, "--suite", str(root / "suite.yaml"), *devices, "-o", "out"]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments, *options],
        cwd=root,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,  # which ends when the last process that has it does
        text=True,
        timeout=LONG / 2,
        check=False,
    )
    return done.returncode, done.stderr


def errors(printed: str) -> list[str]:
    """The messages of a run, of which there is to be no other kind."""
    assert "Traceback" not in printed
    assert "gloo" not in printed
    return [line for line in printed.splitlines() if "error:" in line]


@pytest.mark.parametrize("row", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_image_in_the_share_of_one_process(root: Path, row: int) -> None:
    model = MergedCLIP(Average())
    Trainer(default_root_dir=str(root / "model"), accelerator="cpu", devices=1).merge(
        model, VisionTasks(str(root / "suite.yaml"))
    )
    (root / "experts").rename(root / "gone")  # whose own accuracies would be measured before
    spoil(root / "data" / "grays" / "test.parquet", row)
    status, printed = run_as(2, "test", root, "--merged", "model")
    (message,) = errors(printed)
    assert status == 1
    assert f"grays/test.parquet, row {row}: not a readable image" in message
    assert message.endswith(f"(on process {row % 2} of 2)")


@pytest.mark.slow
def test_a_damaged_image_in_prediction(root: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        (photos / f"{number}.png").write_bytes(b"")
    status, printed = run_as(2, "predict", root, "-m", "Average", "--task", "grays", "--images", str(photos))
    (message,) = errors(printed)
    assert status == 1
    assert "photos/" in message


@pytest.mark.slow
@pytest.mark.parametrize("command", ["test", "compare", "merge"])
def test_a_damaged_image_in_other_commands(command: str, root: Path) -> None:
    spoil(root / "data" / "grays" / ("val.parquet" if command == "merge" else "test.parquet"), 1)
    options = {"compare": ("--mergers", "[Average]"), "merge": ("-m", "Average", "--scale", "search"), "test": ("-m", "Average")}
    status, printed = run_as(2, command, root, *options[command])
    (message,) = errors(printed)
    assert status == 1
    assert "row 1: not a readable image" in message


@pytest.mark.parametrize(
    ("rank", "then"),
    [
        pytest.param(0, "pass", id="the first, and the other waits"),
        pytest.param(1, f"time.sleep({LONG})", id="the other, and the first computes"),
        pytest.param(0, f"time.sleep({LONG})", id="the first, and the other computes", marks=pytest.mark.slow),
        pytest.param(1, "pass", id="the other, and the first waits", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_killed(rank: int, then: str, root: Path) -> None:
    (root / "lost.py").write_text(METHOD.format(name="Lost", rank=rank, then=then))
    status, printed = run_as(2, "merge", root, "-m", "lost.Lost")
    (message,) = errors(printed)
    assert status != 0
    assert f"process {rank} of 2 " in message
    assert rank == 0 or "SIGKILL" in message


def ours(printed: str) -> list[str]:
    """The lines of this program, among those of torchrun."""
    return [line for line in printed.splitlines() if line.startswith("mergekit-vision:")]


@pytest.mark.slow
def test_a_damaged_image_under_torchrun(root: Path) -> None:
    spoil(root / "data" / "grays" / "test.parquet", 1)
    status, printed = run_as(2, "test", root, "-m", "Average", launcher=TORCHRUN)
    (message,) = ours(printed)
    assert status == 1
    assert "row 1: not a readable image" in message


COMPUTES = "hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 30)"  # in C, which no signal interrupts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "then"),
    [
        pytest.param(1, "pass", id="the others wait"),
        pytest.param(0, "pass", id="the first, and the others wait"),
        pytest.param(0, f"time.sleep({LONG})", id="the first, and the others sleep"),
        pytest.param(2, COMPUTES, id="the last, and the others compute"),
        pytest.param(1, f"os.environ['LOCAL_RANK'] == '2' and {COMPUTES}", id="one waits and one computes"),
    ],
)
@pytest.mark.parametrize("launcher", [("-m", "mergekit_vision"), TORCHRUN], ids=["ours", "torchrun"])
def test_one_of_three_that_is_killed(launcher: tuple[str, ...], rank: int, then: str, root: Path) -> None:
    (root / "lost.py").write_text(METHOD.format(name="Lost", rank=rank, then=then))
    status, printed = run_as(3, "merge", root, "-m", "lost.Lost", launcher=launcher)
    assert time.time() - float((root / "killed").read_text()) < 30
    assert status != 0
    (message,) = ours(printed)
    assert f"error: process {rank} of 3 " in message
    assert "where memory runs out" in message
    assert not (root / "out" / "merge.json").exists()
