"""The studies that come with the package: each is one command, which its header gives."""

import json
import re
import shlex
from pathlib import Path

import pytest

from mergekit_vision.cli.main import main
from mergekit_vision.errors import InputError
from mergekit_vision.runs.variant_files import read_variants

REPOSITORY = Path(__file__).parents[2]
LETTERS = 28  # of a row's name, which then stands whole in the chart of the report

STUDIES = sorted((REPOSITORY / "configs" / "studies").glob("*.yaml"))

each_study = pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)


def command_of(study: Path, output: Path) -> list[str]:
    """The one command of a study's header, with another output."""
    (line,) = re.findall(r"^#   mergekit-vision (compare .* -o runs/[\w-]+)$", study.read_text(), flags=re.MULTILINE)
    words = shlex.split(line)
    assert words[words.index("--variants") + 1] == study.relative_to(REPOSITORY).as_posix()
    return [*words[:-1], str(output)]


@each_study
def test_the_command_of_a_study_finds_nothing_wrong(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is run on the demo up to where the long work would start."""

    def checked(*_: object) -> None:
        raise InputError("all is well")

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("mergekit_vision.runs.comparison.check_lineage", checked)
    assert all(len(variant.name) <= LETTERS for variant in read_variants(study))
    assert main([*command_of(study, tmp_path), "--trainer.accelerator", "cpu"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("all is well")


@pytest.mark.slow
@each_study
def test_a_study_runs_on_the_demo(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main([*command_of(study, tmp_path), "--trainer.accelerator", "cpu"]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {row["name"] for row in rows} == {"zero-shot", "experts", *(variant.name for variant in read_variants(study))}
    assert (tmp_path / "report.html").is_file()
