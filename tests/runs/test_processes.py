"""Several processes of which one fails: all end soon, with one message, and none stays behind."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mergekit_vision import MergedCLIP, Trainer, VisionTasks
from mergekit_vision.plugins.average import Average

LONG = 600  # seconds that a process which nobody ends goes on
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}

METHOD = """
import os, signal, time
from mergekit_vision.plugins.average import Average
class {name}(Average):
    def merge(self, inputs):
        if os.environ["LOCAL_RANK"] == "{rank}":
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


def run_two(command: str, root: Path, *options: str, launcher: tuple[str, ...] = ("-m", "mergekit_vision")) -> tuple[int, str]:
    """Run a command as two processes; its status and what it says on standard error, once all of them have ended."""
    arguments = [command, "--suite", str(root / "suite.yaml"), "--trainer.accelerator", "cpu", "--devices", "2", "-o", "out"]
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
    status, printed = run_two("test", root, "--merged", "model")
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
    status, printed = run_two("predict", root, "-m", "Average", "--task", "grays", "--images", str(photos))
    (message,) = errors(printed)
    assert status == 1
    assert "photos/" in message


@pytest.mark.slow
@pytest.mark.parametrize("command", ["test", "compare", "merge"])
def test_a_damaged_image_in_other_commands(command: str, root: Path) -> None:
    spoil(root / "data" / "grays" / ("val.parquet" if command == "merge" else "test.parquet"), 1)
    options = {"compare": ("--mergers", "[Average]"), "merge": ("-m", "Average", "--scale", "search"), "test": ("-m", "Average")}
    status, printed = run_two(command, root, *options[command])
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
    status, printed = run_two("merge", root, "-m", "lost.Lost")
    (message,) = errors(printed)
    assert status != 0
    assert f"process {rank} of 2 " in message
    assert rank == 0 or "SIGKILL" in message


@pytest.mark.slow
def test_a_damaged_image_under_torchrun(root: Path) -> None:
    spoil(root / "data" / "grays" / "test.parquet", 1)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mergekit_vision")
    status, printed = run_two("test", root, "-m", "Average", launcher=launcher)
    (message,) = [line for line in printed.splitlines() if line.startswith("mergekit-vision: error:")]
    assert status == 1
    assert "row 1: not a readable image" in message
