"""The README's commands and code run as written, on a tiny suite of the same shape; its facts are those of the package."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mergekit_vision.__main__ import main
from mergekit_vision.cli.short import expanded
from mergekit_vision.suites.suite import Suite
from mergekit_vision.version import __version__

SINGLE = {**os.environ, "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def place(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with what the README's commands name: suite.yaml, photos/ and a task called gtsrb."""
    content = yaml.safe_load(tiny_suite.read_text())
    names = dict(zip(content["tasks"], ("mnist", "gtsrb", "stripes"), strict=True))
    content["tasks"] = {names[name]: task for name, task in content["tasks"].items()}
    for task in content["tasks"].values():
        task["expert"] = str(tiny_suite.parent / task["expert"])
        for source in task["data"].values():
            source["parquet"] = str(tiny_suite.parent / source["parquet"])
    content["backbone"] = f"local-dir:{tiny_suite.parent / 'base'}"
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (tmp_path / "photos").mkdir()
    Image.effect_noise((24, 24), 60).save(tmp_path / "photos" / "one.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    return tmp_path


def test_commands(place: Path) -> None:
    commands = [
        shlex.split(line, comments=True)[1:]
        for block in blocks("sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("mergekit-vision ") and "--devices" not in line
    ]
    assert len(commands) >= 3
    for command in commands:
        assert main(command) == 0, command


def launched(launcher: str) -> list[str]:
    """The README's command for many nodes, for two processes on this one instead, without its launcher's own options."""
    (line,) = [
        line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines() if line.startswith(f"{launcher} ")
    ]
    words = shlex.split(line)
    words = words[next(at for at, word in enumerate(words) if word in ("mergekit_vision", "mergekit-vision")) + 1 :]
    fewer = {"--trainer.num_nodes": "1", "--devices": "2"}
    words = [fewer.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    return [*words, "--trainer.accelerator", "cpu", "--output", launcher]


@pytest.mark.slow
def test_torchrun(place: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2", "--master-port", "29517"]
    subprocess.run([*command, "-m", "mergekit_vision", *launched("torchrun")], env=SINGLE, check=True, timeout=300)
    assert (place / "torchrun" / "results.json").is_file()


@pytest.mark.slow
def test_slurm(place: Path) -> None:
    """Two tasks of a job, as `srun` would start them."""
    job = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "merge", "SLURM_NNODES": "1"}
    job |= {"SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": "29518"}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "mergekit_vision", *launched("srun")],
            env={**SINGLE, **job, "SLURM_PROCID": rank, "SLURM_LOCALID": rank},
        )
        for rank in ("0", "1")
    ]
    assert [task.wait(timeout=300) for task in tasks] == [0, 0]
    assert (place / "srun" / "results.json").is_file()


def test_code_of_a_plugin(place: Path) -> None:
    (code,) = [block for block in blocks("python") if "class Median" in block]
    (place / "my_package").mkdir()
    (place / "my_package" / "median.py").write_text(code)
    options = ["-m", "my_package.median.Median", "--merger.gain", "2"]
    assert " ".join(options) in README
    assert main(["test", "-s", "suite.yaml", *options]) == 0


def test_code_of_a_run(place: Path) -> None:
    (code,) = [block for block in blocks("python") if "MergedCLIP" in block]
    exec(compile(code, "README.md", "exec"), {})  # the README's own example
    assert (place / "runs" / "esm" / "results.json").is_file()


def test_the_suite_shown_has_the_layout_that_is_read(place: Path) -> None:
    content = yaml.safe_load(blocks("yaml")[0])
    for task in content["tasks"].values():
        task.setdefault("classes", ["a", "b"])
    (place / "shown.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    assert list(Suite.load(place / "shown.yaml").tasks) == ["mnist", "gtsrb"]


def options() -> set[str]:
    """Options that the README's text and tables name."""
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    return {word for span in re.findall(r"`(-[^`]*)`", prose) for word in re.findall(r"--[a-z][\w.]*", span)}


def test_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("merge", "test", "compare", "methods"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    known = set(re.findall(r"--[a-zA-Z][\w.]*", capsys.readouterr().out))
    parts = {option for option in options() if expanded([option])[0].startswith("--model.merger.")}
    assert {expanded([option])[0] for option in options() - parts} <= known


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        assert (ROOT / target.partition("#")[0]).exists(), target


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (__version__, "Apache-2.0")
