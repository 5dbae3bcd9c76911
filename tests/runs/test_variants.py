"""Rows of a comparison from a file: what each is, what is remembered of it, and what is wrong with the file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
from loading import changed

from mergekit_vision import InputError, Merger, Proxies, VisionTasks
from mergekit_vision.merging.recipe import Recipe
from mergekit_vision.merging.scaling import ScaleSearch
from mergekit_vision.plugins.average import Average
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.smile import SMILE
from mergekit_vision.plugins.ties import TIES
from mergekit_vision.plugins.trim import Trim
from mergekit_vision.runs.comparison import Comparison
from mergekit_vision.runs.variant_files import read_variants
from mergekit_vision.runs.variants import Variant, differing
from mergekit_vision.suites.papers import PublishedNumber

Compare = Callable[..., dict[str, dict[str, Any]]]

FILE = """
- {name: plain, merger: ESM}
- {name: nine, merger: {class_path: ESM, init_args: {rank: 4}}, scale: 1, proxies: 9}
- {name: routed, merger: {class_path: ESMPP, init_args: {rank: 2, layers: [c_fc], base: TIES}},
   route: oracle, expert_dtype: bfloat16}
- {name: two, merger: mergekit_vision.plugins.average.Average, proxies: {label: 0, split: test}, tasks: [stripes, colors]}
"""


@pytest.fixture
def compare(tiny_suite: Path, tmp_path: Path) -> Compare:
    """Compare variants; gives the rows by name."""

    def run(
        variants: list[Variant], data: dict[str, Any] | None = None, seeds: int = 1, **recipe: Any
    ) -> dict[str, dict[str, Any]]:
        comparison = Comparison(Recipe(**recipe), {}, variants=variants, seeds=seeds)
        trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
        trainer.predict(comparison, VisionTasks(**{"suite": str(tiny_suite), **(data or {})}), return_predictions=False)
        return {row["name"]: row for row in json.loads(json.dumps(comparison.results))["rows"]}

    return run


def test_a_file_says_what_the_rows_are(tmp_path: Path) -> None:
    (tmp_path / "variants.yaml").write_text(FILE)
    assert read_variants(tmp_path / "variants.yaml") == [
        Variant("plain", ESM()),
        Variant("nine", ESM(rank=4), scale=1.0, proxies={"n": 9}),
        Variant("routed", ESMPP(base=TIES(), rank=2, layers=("c_fc",)), route="oracle", expert_dtype="bfloat16"),
        Variant("two", Average(), proxies={"label": 0, "split": "test"}, tasks=("stripes", "colors")),
    ]


def test_a_row_is_what_a_run_with_its_settings_finds(compare: Compare, tmp_path: Path, merges: list[str]) -> None:
    """And it is remembered as the same: a run with such options measures nothing."""
    (tmp_path / "variants.yaml").write_text(FILE)
    found = compare(read_variants(tmp_path / "variants.yaml"))
    assert len(merges) == 4
    rows: dict[str, tuple[Merger, dict[str, Any], dict[str, Any]]] = {
        "nine": (ESM(rank=4), {"scale": 1.0}, {"proxies": Proxies(n=9)}),
        "two": (
            Average(),
            {"experts": ("stripes", "colors")},
            {"tasks": ["colors", "stripes"], "proxies": Proxies(label=0, split="test")},
        ),
    }
    for name, (merger, recipe, data) in rows.items():
        alone = compare([Variant(name, merger)], data, **recipe)[name]
        assert alone["tasks"] == found[name]["tasks"], name
    assert len(merges) == 4
    assert list(found["two"]["tasks"]) == ["colors", "stripes"]
    assert list(found)[:2] == ["zero-shot", "two"], "means over fewer tasks stand apart"


def test_a_row_says_what_differs() -> None:
    row = Variant("routed", ESMPP(base=TIES(density=0.1), rank=32), scale=0.0, proxies={"n": 4}, tasks=2, expert_dtype="bfloat16")
    assert differing(row) == ["base", "base.density", "scale", "expert_dtype", "tasks", "proxies.n"]
    assert differing(Variant("plain", ESMPP())) == []


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["must be a list of variants"]),
        ("name: ESM", ["must be a list of variants"]),
        ("- ESM\n- {merger: ESM}\n- {name: a, merger: ESM}\n- {name: a, merger: ESM}", ["entry 1", "entry 2: `name`", "entry 4"]),
        ("- {name: a, mergr: ESM}", ["a: unknown key `mergr` (did you mean `merger`?)", "a: `merger` is missing"]),
        ("- {name: a, merger: ESMM}", ["a.merger: there is no merger 'ESMM'. Did you mean ESM?"]),
        (
            "- {name: a, merger: {class_path: ESM, init_args: {rnak: 1}}}",
            ["a.merger: unknown key `init_args.rnak` (did you mean `rank`?)"],
        ),
        ("- {name: a, merger: {class_path: ESM, init_args: {rank: x}}}", ["a.merger: init_args.rank: must be a whole number"]),
        ("- {name: a, merger: {class_path: ESM, init_args: {rank: 0}}}", ["a.merger: ESM: rank is 0"]),
        (
            "- {name: a, merger: {class_path: ESMPP, init_args: {base: {class_path: TIES, init_args: {density: 7}}}}}",
            ["a.merger: init_args.base: TIES: density"],
        ),
        ("- {name: a, merger: 3, scale: fast}", ["a.merger: must be a method's name", "a.scale: is 'fast'"]),
        ("- {name: a, merger: ESM, route: oracle}", ["`route` oracle: ESM returns a static model"]),
        ("- {name: a, merger: ESM, proxies: 0}", ["a.proxies: `proxies.n` must be 1 or more"]),
        ("- {name: a, merger: ESM, proxies: {lable: 0}, tasks: 0}", ["(did you mean `label`?)", "a.tasks: must be a number"]),
    ],
)
def test_every_fault_of_a_file_is_told(text: str, faults: list[str], tmp_path: Path) -> None:
    (tmp_path / "variants.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_variants(tmp_path / "variants.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'variants.yaml'}: {len(faults)} fault")
    assert all(fault in str(caught.value) for fault in faults)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([Variant("a", Average(), tasks=4)], "variant a: `tasks` is 4, but the suite has 3"),
        ([Variant("a", Average(), tasks=("gray",))], "variant a: .*did you mean `grays`"),
        ([Variant("a", Average()), Variant("b", ESM(), proxies={"label": 77})], "variant b: (.|\n)*no image has the label 77"),
        ([Variant("a", ESM(), proxies={"split": "tset"})], "variant a: (.|\n)*did you mean `test`"),
    ],
)
def test_what_does_not_fit_the_suite_is_told_before_any_work(
    compare: Compare, merges: list[str], variants: list[Variant], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        compare(variants)
    assert merges == []


def test_images_of_tasks_that_no_row_merges_are_not_looked_at(compare: Compare, root: Path, merges: list[str]) -> None:
    (root / "data" / "stripes" / "val.parquet").unlink()
    two = [
        Variant("a", ESM(), tasks=2, proxies={"n": 3}),
        Variant("b", ESM(), tasks=("colors",), proxies={"n": 3}),
        Variant("c", ESM()),
    ]
    data = {"suite": str(root / "suite.yaml")}
    compare(two, data, experts=("colors", "grays"))
    assert merges == ["ESM"] * 3
    for rows in (two, [*two, Variant("d", ESM(), tasks=("stripes",), proxies={"n": 3})]):
        with pytest.raises(InputError, match=r"tasks\.stripes\.data\.val: "):
            compare(rows, data, **({} if rows is two else {"experts": ("colors", "grays")}))
    assert merges == ["ESM"] * 3


@pytest.mark.parametrize("proxies", [{}, {"n": 3}])
def test_images_that_a_row_is_sure_to_see_must_be_named(compare: Compare, root: Path, merges: list[str], proxies: Any) -> None:
    data = {"suite": changed(root, lambda tasks: tasks["stripes"]["data"].pop("val"))}
    with pytest.raises(InputError, match=r"tasks\.stripes\.data\.val: missing"):
        compare([Variant("a", Average()), Variant("b", ESM(), scale=1.0, proxies=proxies)], data)
    assert merges == []


def test_no_two_rows_have_one_name() -> None:
    with pytest.raises(InputError, match="name of one of `mergers` too"):
        Comparison(Recipe(), {"ESM": ESM()}, variants=[Variant("ESM", ESM())])


def test_draws_of_proxy_images_are_averaged(compare: Compare, merges: list[str], caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        Variant("ESM", ESM(), proxies={"n": 3, "seed": 4}),
        Variant("Average", Average()),
        Variant("mean", Average(), "agreement"),
    ]
    with caplog.at_level("INFO", logger="mergekit_vision"):
        found = compare(rows, seeds=2, search=ScaleSearch(high=0.5, halvings=0))
    assert merges == ["ESM", "ESM", "Average", "Average", "Average"], "agreement is on proxy images too"
    assert "Average: " in caplog.text
    assert "once: it sees no proxy images" in caplog.text
    each = [compare([Variant("ESM", ESM())], {"proxies": Proxies(n=3, seed=seed)})["ESM"] for seed in (4, 5)]
    assert len(merges) == 5, "each draw is remembered as the run that it is"
    assert [draw["seed"] for draw in found["ESM"]["draws"]] == [4, 5]
    for task, values in found["ESM"]["tasks"].items():
        assert values["accuracy"] == pytest.approx(sum(row["tasks"][task]["accuracy"] for row in each) / 2)
    assert found["Average"]["draws"] == []


def test_a_parameter_decides_whether_there_are_draws(compare: Compare, merges: list[str]) -> None:
    rows = [Variant("sim", SMILE(rule="sim")), Variant("mass", SMILE(rule="mass")), Variant("trimmed", Trim(base=ESM()))]
    found = compare(rows, seeds=2)
    assert merges == ["SMILE", "SMILE", "SMILE", "Trim", "Trim"]
    assert {name: len(row["draws"]) for name, row in found.items() if name in ("sim", "mass", "trimmed")} == {
        "sim": 2,
        "mass": 0,
        "trimmed": 2,
    }


def test_papers_numbers_are_of_all_experts(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    number = PublishedNumber("experts", 0.9, None, None, {}, "", "a paper", "their experts", "")
    monkeypatch.setattr("mergekit_vision.runs.comparison.published_numbers", lambda suite: [number])
    assert compare([Variant("Average", Average())])["experts"]["published"]["accuracy"] == 0.9
    assert compare([Variant("Average", Average())], experts=("grays", "colors"))["experts"]["published"] is None


def test_there_is_at_least_one_draw() -> None:
    with pytest.raises(InputError, match="`seeds` must lie in 1 to"):
        Comparison(Recipe(), {}, seeds=0)
