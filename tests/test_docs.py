"""The site says what the code does: methods and parameters, options, layouts, code and links are checked against it."""

import dataclasses
import importlib.util
import inspect
import logging
import posixpath
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pydantic
import pytest
import torch
import yaml
from PIL import Image
from synthetic import Zoo

import mergekit_vision
from benchmarks import page as benchmarks_page
from benchmarks.records import RESULTS, read_all
from mergekit_vision import MergedCLIP, Trainer, VisionTasks, functional
from mergekit_vision.__main__ import main
from mergekit_vision.cli.commands import COMMANDS, OTHER_COMMANDS
from mergekit_vision.cli.short import SHORT, expanded
from mergekit_vision.export.formats import FORMATS
from mergekit_vision.merger import LinearInfo, Merged, MergeInputs, Merger
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.registry import mergers
from mergekit_vision.runs.variant_files import read_variants
from mergekit_vision.sources.config import config_faults
from mergekit_vision.suites.catalog import PublishedSuite
from mergekit_vision.suites.layout import read_suite, suite_schema
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.imports import import_by_path
from mergekit_vision.support.json_files import indented

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in sorted(DOCS.rglob("*.md"))}
OWN = {name: merger for name, merger in mergers().items() if merger.__module__.startswith("mergekit_vision.")}
FOLDERS = ("benchmarks", "configs", "docs", "examples", "mergekit_vision", "plugins", "tests")
PACKAGES = ("pip", "mkdocs", "pytest", "hf")  # other people's commands

every_page = pytest.mark.parametrize("page", PAGES)
every_method = pytest.mark.parametrize("name", OWN)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def prose(page: str) -> str:
    return re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def executed(code: str, page: str) -> dict[str, Any]:
    """The names that a piece of code leaves, run by itself."""
    names: dict[str, Any] = {"__name__": page}
    exec(compile(code, page, "exec"), names)
    return names


def commands(page: str) -> list[list[str]]:
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


ALL_COMMANDS = [pytest.param(words, id=f"{page}:{' '.join(words)[:60]}") for page in PAGES for words in commands(page)]


# ------------------------------------------------------------------------------------------------------- pages


def anchors(page: str) -> set[str]:
    """Anchors of the headings, as Python-Markdown's `toc` makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_the_navigation_has_every_page() -> None:
    content = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages_of(content["nav"])) == sorted(PAGES)


def pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(entry)]


@every_page
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page), file)) if file else page
        assert place in PAGES or (DOCS / place).is_file(), target
        assert not anchor or anchor in anchors(place), target


@every_page
def test_paths_in_the_repository_exist(page: str) -> None:
    for path in re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", PAGES[page]):
        assert (ROOT / path).exists(), path


def test_the_reference_names_what_there_is() -> None:
    shown = {name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", PAGES[page], flags=re.MULTILINE)}
    public = {f"mergekit_vision.{name}" for name in mergekit_vision.__all__ if name != "__version__"}
    public |= {f"mergekit_vision.functional.{name}" for name in functional.__all__}
    objects = {id(import_by_path(name)) for name in shown}
    assert all(id(import_by_path(name)) in objects for name in public)


# ----------------------------------------------------------------------------------------------------- methods


def test_tables_of_methods_are_up_to_date() -> None:
    """They are generated: `python docs/update.py` refreshes them."""
    spec = importlib.util.spec_from_file_location("update", DOCS / "update.py")
    assert spec is not None
    assert spec.loader is not None
    update = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update)
    for page, papers in update.PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert "<!-- methods:begin -->" in text
        assert text == update.updated(text, papers), f"{page.name}: run `python docs/update.py`"


def test_the_page_of_benchmarks_is_up_to_date() -> None:
    """It is generated: `python docs/update.py` refreshes it."""
    assert PAGES["benchmarks.md"] == benchmarks_page.content(read_all(RESULTS)), "run `python docs/update.py`"


def test_the_schema_of_suites_is_up_to_date() -> None:
    """It is generated: `python docs/update.py` refreshes it."""
    if tuple(map(int, pydantic.VERSION.split(".")[:2])) < (2, 11):
        pytest.skip("older versions of pydantic write the same schema otherwise")
    text = (DOCS / "suite.schema.json").read_text(encoding="utf-8")
    assert text == indented(suite_schema()), "run `python docs/update.py`"


def section(name: str) -> str:
    (found,) = re.findall(rf"^## {name}\n(.*?)(?=^## |\Z)", PAGES["methods.md"], flags=re.DOTALL | re.MULTILINE)
    return found


def rows(text: str) -> dict[str, tuple[str, ...]]:
    """Rows of the tables in some Markdown: first cell -> the others, without headers and code marks."""
    cells = [[cell.strip() for cell in line.strip("|").split(" |")] for line in text.splitlines() if line.startswith("|")]
    return {first.strip("`"): tuple(others) for first, *others in cells if first and not first.startswith("-")}


def test_the_catalog_has_every_method() -> None:
    assert sorted(re.findall(r"^## (\w+)$", PAGES["methods.md"], flags=re.MULTILINE)) == sorted(OWN)


@every_method
def test_parameters_and_defaults(name: str) -> None:
    parameters = inspect.signature(OWN[name]).parameters
    table = {row: cells for row, cells in rows(section(name)).items() if len(cells) == 2 and row != "parameter"}
    assert list(table) == list(parameters)
    for parameter, (default, meaning) in table.items():
        value = parameters[parameter].default
        assert yaml.safe_load(default.strip("`")) == (list(value) if isinstance(value, tuple) else value)
        assert meaning


@every_method
def test_the_source_is_the_paper_that_the_method_cites(name: str) -> None:
    (source,) = rows(section(name))["source"]
    assert source == (OWN[name].paper or "this package")


def merged_and_asked(merger: Merger) -> tuple[Merged, set[str]]:
    """What a method makes of a made-up encoder, and what it asked its inputs for."""
    asked, sums, zoo = set(), list[list[str]](), Zoo(tasks=2)

    def proxies(*args: Any) -> None:
        asked.add("proxies")
        zoo.run_proxies(*args)

    def share(function: Callable[[str], Any], items: Mapping[str, int], description: str) -> dict[str, Any]:
        asked.add("share")
        if not description:
            sums.append(list(items))
        return {item: function(item) for item in items}

    def track(items: Iterable[str], description: str) -> Iterable[str]:
        before = len(sums)
        yield from items
        if len(sums) == before:  # and it is not the parts of a sum that are tracked, which are shared
            asked.add("track")

    merged = merger.merge(dataclasses.replace(zoo.inputs(), run_proxies=proxies, share=share, track=track))
    return merged, asked | ({"proxies"} if zoo.asked else set())


@every_method
def test_facts(name: str) -> None:
    merged, asked = merged_and_asked(OWN[name]())
    facts = {fact: cells[0] for fact, cells in rows(section(name)).items() if len(cells) == 1}
    assert facts["result"] == OWN[name].kind == ("dynamic" if merged.routed else "oracle" if merged.experts else "static")
    assert facts["inputs"] == ("weights, proxy images" if "proxies" in asked else "weights")
    assert OWN[name].needs == ("proxies" if "proxies" in asked else "none")
    expected = {"shared": {"share"}, "repeated": {"track"}}.get(facts["work"], {"share", "track"})
    assert asked & {"share", "track"} == expected
    if facts["coefficient"] == "no effect":
        assert not merged.scalable
    else:
        assert float(facts["coefficient"].split()[0]) == merged.scale


def test_the_contract_is_described_whole() -> None:
    table = {row.partition("(")[0] for row in rows(PAGES["plugins.md"])}
    inner = {"run_proxies", "run_backward", "choose_scale", "share", "processes", "streams", "change"}
    members = {name for name in vars(MergeInputs) if not name.startswith("_")} | {f.name for f in dataclasses.fields(MergeInputs)}
    assert members - inner <= table
    assert inner <= set(re.findall(r"`(\w+)`", prose("plugins.md")))
    assert {field.name for field in dataclasses.fields(Merged)} <= table
    assert {*LinearInfo._fields, "title", "paper", "needs", "kind"} <= table
    for name in ("observe", "spread", "delta", "deltas", "changed", "track", "coefficient"):
        function = getattr(MergeInputs, name, None) or (lambda items, description: None)
        arguments = [argument for argument in inspect.signature(function).parameters if argument != "self"]
        assert f"`{name}({', '.join(arguments)})`" in PAGES["plugins.md"]


# ---------------------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """Options of all commands together, by their help."""
    with redirect_stdout(StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mergekit-vision"])
        main(["--help"])
        for command in (*COMMANDS, *OTHER_COMMANDS):
            with pytest.raises(SystemExit):
                main([command, "--help"])
    return set(re.findall(r"--[\w.]+", printed.getvalue()))


@every_page
def test_options_in_the_text_exist(page: str, known_options: set[str]) -> None:
    benchmarks = {"--check", "--layers"} if page == "performance.md" else set()
    for span in re.findall(r"`(--[^`]+)`", prose(page)):
        for option in re.findall(r"--[\w.]+", span):
            full = expanded([option])[0]
            assert full in known_options | benchmarks or full.startswith("--model.merger."), option


def test_every_short_option_is_listed() -> None:
    table = rows(PAGES["cli.md"])
    for short in SHORT:
        if short.full.count("."):
            row = "`, `".join(short.names)
            assert table[row][0] == f"`{short.full}`", short
        else:
            assert all(f"`{name}`" in PAGES["cli.md"] for name in short.names), short


def check_benchmark(module: str, words: list[str]) -> None:
    """Each option is one that the script takes."""
    names = (f"{module.replace('.', '/')}.py", f"{module}/__main__.py", "benchmarks/records.py")
    text = "".join(path.read_text(encoding="utf-8") for name in names if (path := ROOT / name).is_file())
    known = re.findall(r'add_argument\(\s*"(--[\w-]+)"', text)
    assert {word for word in words if word.startswith("--")} <= set(known)


@pytest.fixture
def shown_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method on the page of plugins, importable by the name that stands there."""
    module = ModuleType("my_package.median")
    monkeypatch.setitem(sys.modules, "my_package", ModuleType("my_package"))
    monkeypatch.setitem(sys.modules, "my_package.median", module)
    exec(compile(blocks("plugins.md", "python")[0], "plugins.md", "exec"), vars(module))


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_commands_are_accepted(
    words: list[str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands of ours are parsed, with all their options, and not run."""
    monkeypatch.chdir(ROOT)
    if any("my_package" in word for word in words):
        request.getfixturevalue("shown_method")
    monkeypatch.setattr(sys, "argv", ["mergekit-vision"])
    program, ours = words[0], [word for word in words if word in ("mergekit-vision", "mergekit_vision")]
    if words[:2] == ["python", "-m"]:
        check_benchmark(words[2], words[3:])
    elif program == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif program in PACKAGES:
        check_package_command(words)
    else:
        assert program in ("mergekit-vision", "torchrun", "srun")
        arguments = words[words.index(ours[0]) + 1 :]
        if arguments[0] == "methods":
            assert main(arguments) == 0
            return
        if arguments[0] in OTHER_COMMANDS:
            import_by_path(f"mergekit_vision.cli.{arguments[0]}.parser")().parse_args(arguments[1:])
            return
        with pytest.raises(SystemExit) as ended:
            main(arguments if "--help" in arguments or "--model.merger.help" in arguments else [*arguments, "--print_config"])
        assert ended.value.code in (0, None), capsys.readouterr().err


def check_package_command(words: list[str]) -> None:
    """What `pip` and `pytest` are given is there."""
    for word in words[1:]:
        if word.startswith(".["):
            for extra in word[2:-1].split(","):
                assert re.search(rf"^{extra} =$", (ROOT / "setup.cfg").read_text(), flags=re.MULTILINE), f"no extra {extra}"
        elif "/" in word:
            assert (ROOT / word).exists()


# -------------------------------------------------------------------------------------------- layouts and code


@every_page
def test_layouts_are_read(page: str, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        content = yaml.safe_load(block)
        path = tmp_path / f"{number}.yaml"
        if isinstance(content, list) and "merger" in content[0]:
            path.write_text(block)
            assert [row.name for row in read_variants(path)] == [row["name"] for row in content]
        elif isinstance(content, list):
            assert all(not config_faults(source) for source in content), block
        else:
            path.write_text(re.sub(r"^\w+_root: .*\n", "", block, flags=re.MULTILINE))  # of directories that are not here
            inherited = PublishedSuite.load(content["extends"]).tasks if "extends" in content else {}
            tasks = content.get("tasks", {})
            expected = [name for name in dict.fromkeys([*inherited, *tasks]) if tasks.get(name, {}) is not None]
            assert list(read_suite(path)["tasks"]) == expected


def test_methods_on_the_page_of_plugins() -> None:
    """The code shown works, and does what its text says."""
    zoo, names = Zoo(tasks=3), {"__name__": "plugins"}
    for block in blocks("plugins.md", "python"):
        exec(compile(block, "plugins.md", "exec"), names)
    update = names["Median"](gain=2.0).merge(zoo.inputs()).update  # type: ignore[operator]
    for key in zoo.base:
        assert (update[key].double() - 2 * zoo.delta64(key).median(0).values).abs().max() < 1e-7
    update = names["Weighted"]().merge(zoo.inputs()).update  # type: ignore[operator]
    for linear in zoo.inputs().linears:
        energy = [zoo.rows(task, linear.name).square().sum(0) for task in zoo.experts]
        expected = sum(e * d for e, d in zip(energy, zoo.delta64(linear.weight), strict=True)) / sum(energy)
        assert (update[linear.weight].double() - expected).norm() < 1e-6 * expected.norm()


def test_code_on_the_page_of_python(
    tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, in order, on a small suite."""
    content = yaml.safe_load(tiny_suite.read_text())
    content["backbone"] = f"local-dir:{tiny_suite.parent / 'base'}"
    for task in content["tasks"].values():
        task["expert"] = str(tiny_suite.parent / task["expert"])
        for source in task["data"].values():
            source["parquet"] = str(tiny_suite.parent / source["parquet"])
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "python"}
    level = logging.getLogger("mergekit_vision").level
    try:
        for block in blocks("python.md", "python"):
            exec(compile(block, "python.md", "exec"), names)
    finally:
        logging.getLogger("mergekit_vision").setLevel(level)
    assert set(names["accuracies"]) == {f"accuracy/{task}" for task in Suite.load("suite.yaml").tasks}
    assert names["embeddings"].shape[0] == 2
    assert len(names["brightness"]) == len(Suite.load("suite.yaml").tasks)
    assert names["preprocess"](Image.new("RGB", (30, 20))).shape[-2:] == names["size"]
    assert {path.name for path in (tmp_path / "runs" / "compare").iterdir()} >= {"results.json", "report.html"}
    printed = capsys.readouterr().out
    assert all(f"{name} {merger.__module__}" in printed for name, merger in OWN.items())


def test_commands_and_code_on_the_page_of_export(tiny_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece of code by itself, on small models; each library finds the same probabilities or embeddings."""
    for package in {package for form in FORMATS.values() for package in form.packages}:
        pytest.importorskip(package, reason="the extras hf and onnx are not installed")
    monkeypatch.chdir(tmp_path)
    for name, merger in {"esm": ESM(), "esmpp": ESMPP(rank=2, layers=("c_fc",))}.items():
        Trainer(default_root_dir=f"runs/{name}", accelerator="cpu").merge(MergedCLIP(merger), VisionTasks(str(tiny_suite)))
    written = [*commands("export.md"), *commands("peft.md")]
    exports = [words[1:] for words in written if words[:2] == ["mergekit-vision", "export"]]
    assert {words[words.index("--to") + 1] for words in exports} == FORMATS.keys()
    assert [main(words) for words in exports] == [0] * len(exports)
    Image.effect_noise((32, 32), 60).convert("RGB").save("photo.png")
    *before, onnx, last = blocks("export.md", "python")
    theirs, tower, ours = (executed(block, "export.md") for block in before)
    Image.effect_noise((39, 32), 60).convert("RGB").save("photo.png")  # 19.5 to 16 pixels: cut to 19, and 1.5 left of the crop
    graph, program = executed(onnx, "export.md"), executed(last, "export.md")
    assert tower["embeddings"].shape == (1, 32)
    assert theirs["probabilities"].tolist()[0] == pytest.approx(ours["probabilities"].tolist()[0], abs=0.02)
    _, _, preprocess = open_clip.create_model_and_transforms("local-dir:runs/esmpp")
    with torch.no_grad():
        image = mergekit_vision.load("runs/esmpp")(preprocess(Image.open("photo.png"))[None])
    assert (torch.from_numpy(graph["embeddings"]) - image).norm() < 1e-3 * image.norm()
    with torch.no_grad():
        images = mergekit_vision.load("runs/esmpp")((program["images"] - program["mean"]) / program["std"])
    assert (program["embeddings"] - images).norm() < 1e-4 * images.norm()


def test_the_places_for_something_new_are_there() -> None:
    """Files that the table names, classes and constants in some file of the package."""
    table = PAGES["architecture.md"].split("## Where something new goes")[1].split("\n\n")[1]
    spans = set(re.findall(r"`([^`]+)`", table))
    files = {span for span in spans if re.fullmatch(r"\w+(?:/\w+)*\.py", span)}
    names = {span for span in spans if re.fullmatch(r"_?[A-Z]\w+|_\w+|[a-z]+_\w+", span)} - files
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "mergekit_vision").rglob("*.py")]
    assert [file for file in files if not any((ROOT / above / file).is_file() for above in ("mergekit_vision", "."))] == []
    assert [name for name in names if not any(re.search(rf"\b{name}\b", source) for source in sources)] == []
    assert {"checkpoints/opening.py", "SUFFIXES", "open_container"} <= files | names
