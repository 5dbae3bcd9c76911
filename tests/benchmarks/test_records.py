"""Results have one form: rows stay until their case is measured again, and what got worse by more than the noise is named."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compare, page
from benchmarks.__main__ import FULL, QUICK, main
from benchmarks.page import SECTIONS
from benchmarks.records import RESULTS, Case, Row, Run, keep, read, read_all
from benchmarks.scaling import amdahl, rows
from benchmarks.tables import layouts

HERE = Run({"processor": "P", "cores": 2, "device": "cpu"}, {"python": "3.11", "torch": "2.9"}, "abc", "2026-01-01")


def row(seconds: float, repeats: int = 1, spread: float = 0.0, **case: str | int) -> Row:
    around = {"seconds": [seconds - spread, seconds + spread]} if spread else {}
    return Row({"method": "ESM", **case}, {"seconds": seconds}, around, repeats)


def test_a_row_replaces_its_own_case_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "merging.json"
    keep(path, HERE, [row(5, threads=1), row(3, threads=2)])
    later = replace(HERE, commit="def", rows=[])
    keep(path, later, [row(2, threads=2)])
    keep(path, later, [Row({"method": "TIES"}, failed="no memory")])
    for part in ("device", "processor"):
        keep(path, replace(HERE, machine={**HERE.machine, part: "another"}), [row(1, threads=2)])
    first, second, *others = read(path)
    assert first == replace(HERE, rows=[row(5, threads=1)])
    assert second == replace(later, rows=[row(2, threads=2), Row({"method": "TIES"}, failed="no memory")])
    assert [run.rows for run in others] == [[row(1, threads=2)]] * 2, "another machine is another case"
    content = json.loads(path.read_text())
    assert (content["schema"], content["benchmark"], content["units"]) == (1, "merging", {"seconds": "s"})


def test_a_run_that_is_left_without_rows_goes(tmp_path: Path) -> None:
    keep(tmp_path / "a.json", HERE, [row(5)])
    keep(tmp_path / "a.json", replace(HERE, date="2026-01-02"), [row(4)])
    assert [run.date for run in read(tmp_path / "a.json")] == ["2026-01-02"]


def test_unknown_measures_and_other_schemas_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not in MEASURES: minutes"):
        keep(tmp_path / "a.json", HERE, [Row({}, {"minutes": 1.0})])
    (tmp_path / "a.json").write_text('{"schema": 2}')
    with pytest.raises(ValueError, match="has schema 2, not 1"):
        read(tmp_path / "a.json")


def named(old: Row, new: Row, later: Run = HERE) -> list[str]:
    runs = ({"merging": [replace(run, rows=[found])]} for run, found in ((HERE, old), (later, new)))
    return [str(one) for one in compare.worse(*runs)]


def test_what_is_worse_by_more_than_the_noise_is_named() -> None:
    assert named(row(10), row(12)) == ["merging, method ESM: seconds 10 s -> 12 s (+20%)"]
    assert not named(row(10), row(11)), "within the noise of a single measurement"
    assert not named(row(12), row(10)), "better"
    assert not named(row(10), row(12, threads=2)), "another case"
    assert not named(row(10), row(12), replace(HERE, machine={**HERE.machine, "processor": "Q"}))
    assert not named(row(10), row(12), replace(HERE, versions={**HERE.versions, "torch": "2.10"}))
    assert named(row(10), row(12), replace(HERE, versions={**HERE.versions, "mergekit_vision": "2"}))


def test_repeats_say_what_the_noise_is() -> None:
    assert named(row(10, 3, spread=0.1), row(11, 3, spread=0.1)), "less than the noise of a single measurement, but apart"
    assert not named(row(10, 3, spread=2.0), row(13, 3, spread=2.0)), "more than it, but they overlap"
    assert not named(row(10, 3, spread=0.1), row(10.4, 3, spread=0.1)), "apart by less than five percent"


def test_of_some_measures_less_is_worse() -> None:
    fast, slow = (Row({}, {"images_per_second": value}) for value in (100.0, 80.0))
    assert named(fast, slow) == ["merging, : images_per_second 100 images/s -> 80 images/s (-20%)"]
    assert not named(slow, fast)


def test_a_case_that_fails_now_is_worse() -> None:
    failing = replace(row(10), values={}, failed="out of memory")
    assert named(row(10), failing) == ["merging, method ESM: fails now: out of memory"]
    assert not named(failing, row(10))
    assert not named(failing, replace(failing, failed="out of disk"))


def test_the_program_fails_only_when_it_is_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seconds in (("old", 10), ("new", 20)):
        keep(tmp_path / name / "merging.json", HERE, [row(seconds)])
    places = [str(tmp_path / "old"), str(tmp_path / "new" / "merging.json")]
    assert compare.main(places) == 0
    assert compare.main([*places, "--fail"]) == 1
    assert compare.main([places[0], places[0], "--fail"]) == 0
    assert "1 cases compared with an earlier run, 1 of them worse" in capsys.readouterr().out


def test_tables_say_once_what_their_rows_have_in_common() -> None:
    case: Case = {"model": "A", "tasks": 8}
    found = [
        Row({**case, "method": "ESM"}, {"seconds": 158.46, "error": 1.2e-5}, {"seconds": [150, 161]}, 3),
        Row({**case, "method": "TIES"}, failed="no memory"),
        Row({**case, "model": "B", "method": "ESM"}, {"seconds": 2.0}),
    ]
    first, second = layouts(found)
    assert first.title == "model A, tasks 8"
    assert first.head == ["method", "wall, s", "error"]
    assert first.lines == [["ESM", "158 (150 to 161)", "1.2e-05"], ["TIES", "failed: no memory", ""]]
    assert (second.title, second.lines) == ("model B", [["8", "ESM", "2.00"]])


def test_the_page_has_every_benchmark() -> None:
    programs = {command.split()[0] for command in (*FULL, *QUICK)}
    assert programs == SECTIONS.keys()
    assert read_all(RESULTS).keys() <= SECTIONS.keys()
    text = page.content({name: [replace(HERE, rows=[row(1)])] for name in SECTIONS})
    assert text.count("**P, 2 cores; Python 3.11, torch 2.9, commit `abc`, 2026-01-01**") == len(SECTIONS)


def test_sixteen_threads_follow_from_one_and_two() -> None:
    assert amdahl(10, 5, 16) == 10 / 16, "all is divided"
    assert amdahl(10, 11, 16) == 10, "nothing is"
    serial, divided = 2.0, 8.0
    assert amdahl(serial + divided, serial + divided / 2, 16) == serial + divided / 16
    runs = {case: [{"seconds": time, "cpu_seconds": 10.0, "peak_MiB": 1.0}] for case, time in {(1, 1): 10.0, (1, 2): 6.0}.items()}
    one, two, modeled = rows(runs, {})
    assert (one.values["speedup"], two.values["speedup"], modeled.values["speedup"]) == (1, 1.667, 4)
    assert modeled.case == {"processes": 1, "threads": 16, "source": "Amdahl's law"}
    assert "cpu_speedup" not in two.values, "CPU time is the sum of the threads'"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the benchmarks that were run, each of which only keeps a row; they get slower and slower."""
    names: list[str] = []

    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        names.append(name := command[2].removeprefix("benchmarks."))
        if names.count(name) == 3:
            raise KeyboardInterrupt
        keep(Path(command[command.index("--results") + 1]) / f"{name}.json", HERE, [row(10 * len(names))])
        return subprocess.CompletedProcess(command, name == "reading")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(page, "write", lambda: pytest.fail("a quick run touches the page"))
    return names


def test_all_benchmarks_run_and_are_compared_with_the_last_time(
    measured: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--quick", "--workdir", str(tmp_path)]
    assert main(quick) == 1, "one of them fails"
    assert measured == [command.split()[0] for command in QUICK]
    assert sorted(path.stem for path in (tmp_path / "quick").iterdir()) == sorted(measured)
    printed = capsys.readouterr().out
    assert "failed: reading" in printed
    assert "worse" not in printed.replace("0 of them worse", "")
    measured[:] = ["another"]
    assert main([*quick, "--only", "merging"]) == 0
    assert "worse: merging, method ESM: seconds 10 s -> 20 s (+100%)" in capsys.readouterr().out
    before = read_all(tmp_path / "quick")
    measured[:] = ["merging", "merging"]
    assert main([*quick, "--only", "merging", "scaling"]) == 1
    assert measured == ["merging"] * 3, "an interruption ends the whole run"
    assert read_all(tmp_path / "quick") == before
