"""``mergekit-vision doctor``: what it finds, and that it finds it where things are broken."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from loopback_hub import LoopbackHub, point_at

from mergekit_vision.cli import doctor, self_check
from mergekit_vision.cli.main import main
from mergekit_vision.support import hardware, installation
from mergekit_vision.support.cache import Cache, json_form
from mergekit_vision.support.memory import Memory
from mergekit_vision.support.verdicts import Verdict, verdicts

NO_OPERATORS = "raise RuntimeError('operator torchvision::nms does not exist')"


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_broken_torchvision_is_reported(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not whole:  # no more than what breaks in it
        monkeypatch.setattr(self_check, "_command", lambda _: [sys.executable, "-c", "import torchvision"])
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(NO_OPERATORS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the self-check
    monkeypatch.syspath_prepend(tmp_path)  # of this process
    monkeypatch.delitem(sys.modules, "torchvision")
    assert main(["doctor", "--offline"]) == 1
    printed = capsys.readouterr()
    found = [line.split(None, 2) for line in printed.out.splitlines()]
    assert {level for level, *_ in found} <= {"ok", "warning", "fault"}
    faults = {subject: text for level, subject, text in found if level == "fault"}
    assert list(faults) == ["torchvision:", "self-check:"]
    minor = int(torch.__version__.split(".")[1]) + 15
    for word in (f"does not go with torch {torch.__version__}", "nms does not exist", f"'torchvision==0.{minor}.*'"):
        assert word in faults["torchvision:"]
    assert "torchvision::nms" in faults["self-check:"]
    assert printed.err == "mergekit-vision: error: doctor: 2 faults, see above\n"


@pytest.mark.slow
def test_a_sound_installation_has_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--offline"]) == 0
    assert "ok       self-check: two experts of the demo merged and evaluated" in capsys.readouterr().out


def test_a_compromised_release_is_named_and_nothing_of_it_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = installation.installed
    monkeypatch.setattr(installation, "installed", lambda name: "2.6.2" if name == "lightning" else real(name))
    monkeypatch.setattr(doctor, "self_check", lambda: pytest.fail("imported"))
    monkeypatch.setattr(hardware, "torchvision_verdicts", lambda: pytest.fail("imported"))
    assert main(["doctor", "--offline"]) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fault")]
    assert len(faults) == 2
    assert "lightning: 2.6.2 was published with malicious code; pip install 'lightning!=2.6.2,!=2.6.3" in faults[0]
    assert "self-check: left out, as lightning 2.6.2 must not be imported" in faults[1]


def test_what_is_read_before_that_imports_nothing_heavy() -> None:
    script = "import sys, mergekit_vision.cli.doctor; print([n for n in ('torch', 'lightning', 'rich') if n in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"


@pytest.mark.parametrize(
    ("versions", "level", "text"),
    [
        ({"torch": "2.3.1"}, "fault", "torch: 2.3.1 is installed, and >=2.4 is needed; pip install 'torch>=2.4'"),
        ({"pillow": None}, "fault", "pillow: is not installed; pip install 'pillow>=10'"),
        ({"datasets": None}, "warning", "extra hub: datasets not installed; for data sets of the hub"),
        ({"transformers": "4.41", "peft": None}, "ok", "extra hf: peft not installed"),
        ({"datasets": "2.19"}, "fault", "datasets: 2.19 is installed, and >=2.20 is needed"),
        ({"datasets": "4.0.0"}, "ok", "datasets: since 4 no data set that is a script is loaded"),
    ],
)
def test_packages(versions: dict[str, str | None], level: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = installation.installed
    monkeypatch.setattr(installation, "installed", lambda name: versions[name] if name in versions else real(name))
    assert any(each.level == level and str(each)[9:].startswith(text) for each in installation.package_verdicts())


def test_torch_and_torchvision_that_were_not_released_together(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    monkeypatch.setattr(torchvision, "__version__", "0.1.2")
    (found,) = hardware.torchvision_verdicts()
    assert (found.level, "no pair that was released together" in found.text) == ("warning", True)


def test_threads_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, cores, level in ((8, 2, "warning"), (1, 4, "warning"), (1, 1, "ok"), (4, 4, "ok")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(hardware, "usable_cores", lambda cores=cores: cores)
        (found,) = hardware.thread_verdicts()
        assert found.level == level, found
    for free, level in ((int(1e9), "warning"), (int(9e9), "ok"), (None, "ok")):
        monkeypatch.setattr(hardware, "main_memory", lambda free=free: None if free is None else Memory(0, free))
        (found,) = hardware.memory_verdicts()
        assert found.level == level, found


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="told by Linux")
def test_what_a_container_keeps_of_files_that_were_read_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    gigabyte, read = 10**9, Path.read_text
    files = {
        "/proc/meminfo": f"MemAvailable: {64 * gigabyte >> 10} kB\n",
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/memory.max": f"{16 * gigabyte}\n",
        "/sys/fs/cgroup/memory.current": f"{16 * gigabyte}\n",
        "/sys/fs/cgroup/memory.stat": f"anon {3 * gigabyte}\ninactive_file {13 * gigabyte}\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda path, *options: files.get(str(path)) or read(path, *options))
    assert [(each.level, each.text) for each in hardware.memory_verdicts()] == [("ok", "13.0 GB free")]


def test_the_cache_is_cleared_of_what_is_ours(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("heads", "accuracies"):
        Cache(folder, json_form(int)).recall(["x"], lambda: 5)
    (cache / "backbones" / ("0" * 64)).mkdir(parents=True)
    (cache / "backbones" / ("0" * 64) / "open_clip_config.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ("a" * 40)).write_text("mergekit-vision cache 1 not in the cache")
    (cache / "link").symlink_to(tmp_path / "elsewhere")
    others = [cache / "data" / "EMNIST" / "raw", cache / "heads" / ("b" * 40), cache / "heads" / "notes.txt"]
    for place in others:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("somebody else's")
    assert main(["doctor", "--clear-cache"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.rpartition(",")[0] for line in printed] == [
        f"removed 1 of {name}" for name in ("accuracies", "backbones", "heads")
    ]
    left = {path.relative_to(cache) for path in cache.rglob("*") if path.is_file()}
    assert left == {place.relative_to(cache) for place in others}
    assert (tmp_path / "elsewhere" / ("a" * 40)).exists()
    assert main(["doctor", "--clear-cache"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_the_hub(loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(loopback_hub, tmp_path, monkeypatch)
    assert [each.level for each in doctor._hub(False)] == ["ok"]  # whatever it says: this one knows no such page
    assert loopback_hub.requests == ["HEAD /"]
    assert list(doctor._hub(True)) == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", closed)
        monkeypatch.setattr(doctor, "_PATIENCE", 0.1)
        (found,) = doctor._hub(False)
        assert (found.level, "timed out" in found.text) == ("warning", True)
    (found,) = doctor._hub(False)
    assert (found.level, "refused" in found.text) == ("warning", True)
    point_at(loopback_hub, tmp_path, monkeypatch, offline=True)
    assert [each.level for each in doctor._hub(False)] == ["warning"]
    assert len(loopback_hub.requests) == 1


def test_a_check_that_fails_is_a_fault() -> None:
    def broken() -> Iterator[Verdict]:
        yield Verdict("ok", "a", "fine")
        raise OSError("libcudart.so.13:\ncannot open shared object file")

    found = list(map(str, verdicts("b", broken, "install it anew")))
    assert found == ["ok       a: fine", "fault    b: OSError: libcudart.so.13: cannot open shared object file; install it anew"]


def test_the_self_check_judges_how_its_process_ended() -> None:
    ended = subprocess.CompletedProcess([], -11, b"", b"")
    assert "ended by SIGSEGV" in self_check._reason(ended)
    ended = subprocess.CompletedProcess([], 1, b"", b"a warning\nmergekit-vision: error: no memory\n")
    assert self_check._reason(ended).endswith("evaluated: no memory")
    for accuracy, level in ((0.933, "ok"), (0.91, "ok"), (0.5, "fault")):
        assert self_check._judged({"mean": {"accuracy": accuracy}}, 1.0).level == level


def test_the_self_check_is_one_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WORLD_SIZE", "SLURM_NTASKS", "LOCAL_RANK"):
        monkeypatch.setenv(name, "8")
    found = self_check._environment(str(tmp_path))
    assert not {"WORLD_SIZE", "SLURM_NTASKS", "LOCAL_RANK"} & found.keys()
    assert found["PATH"] == os.environ["PATH"]
    assert Path(found["MERGEKIT_VISION_CACHE"]).is_relative_to(tmp_path)
