"""Dynamic models whose experts are kept in bfloat16: what is evaluated, stored, remembered and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mergekit_vision import InputError, MergedCLIP, Trainer, VisionTasks, load
from mergekit_vision.cli.main import main
from mergekit_vision.export.manifest import EXPERTS
from mergekit_vision.merging.recipe import Recipe
from mergekit_vision.merging.workbench import Workbench
from mergekit_vision.plugins.average import Average
from mergekit_vision.plugins.esmpp import ESMPP
from mergekit_vision.plugins.esmppfit import ESMPPFit


def test_the_experts_are_those_of_float32_rounded_once(bench: Workbench) -> None:
    """Also where a method fits experts one after the other: it works with its own."""
    merger = ESMPPFit(rank=2)
    whole, half = (Recipe(expert_dtype=dtype).merge(bench, merger) for dtype in ("float32", "bfloat16"))
    assert (whole.record["expert_dtype"], half.record["expert_dtype"]) == ("float32", "bfloat16")
    for name, experts in half.routed.items():
        given, found = whole.routed[name].tensors(), experts.tensors()
        for part in ("up", "down"):
            assert torch.equal(found.pop(part), given.pop(part).bfloat16()), f"{name}.{part}"
        assert all(torch.equal(tensor, given[key]) for key, tensor in found.items()), name
    assert all(torch.equal(value, whole.weights[key]) for key, value in half.weights.items())
    assert "expert_dtype" not in Recipe().merge(bench, Average()).record


def test_a_model_in_bfloat16_is_stored_and_found_again(tiny_suite: Path, tmp_path: Path) -> None:
    place, data = tmp_path / "merged", VisionTasks(str(tiny_suite))
    model = MergedCLIP(ESMPP(rank=2), scale=1.0, expert_dtype="bfloat16")
    Trainer(default_root_dir=str(place), accelerator="cpu").merge(model, data)
    stored = load_file(place / EXPERTS)
    kinds = {name: tensor.dtype for name, tensor in stored.items()}
    assert {kind for name, kind in kinds.items() if name.endswith((".up", ".down"))} == {torch.bfloat16}
    assert {kind for name, kind in kinds.items() if ".router." in name} == {torch.float32}
    images = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert model.encoder is not None
    with torch.inference_mode():
        assert torch.equal(load(place)(images), model.encoder(images))
    results = []
    for again in (model, MergedCLIP(merged=str(place))):
        Trainer(default_root_dir=str(tmp_path / "test"), accelerator="cpu").test(again, data)
        results.append(json.loads((tmp_path / "test" / "results.json").read_text()))
    assert results[0]["tasks"] == results[1]["tasks"]
    assert results[0]["expert_dtype"] == results[1]["expert_dtype"] == "bfloat16"


STATIC = (
    ["merge", "-m", "Average"],
    ["tune", "-m", "Trim", "--grid", "{density: [0.2]}"],
    ["compare", "--mergers", "[Average, TIES]"],
)


@pytest.mark.parametrize("command", STATIC, ids=lambda command: command[0])
def test_what_has_no_experts_to_round_says_so(
    command: list[str], tiny_suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [command[0], "-s", str(tiny_suite), *command[1:], "--expert-dtype", "bfloat16", "-o", str(tmp_path)]
    assert main(given) == 1
    assert "--expert-dtype bfloat16: a static model has no routed experts" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`expert_dtype` is 'float16', but must be float32 or bfloat16"):
        MergedCLIP(ESMPP(), expert_dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="`expert_dtype` goes with `merger`"):
        MergedCLIP(merged=str(tmp_path), expert_dtype="bfloat16")


def test_a_comparison_counts_and_remembers_each_dtype_apart(tiny_suite: Path, tmp_path: Path, merges: list[str]) -> None:
    """A static row is the same in either."""
    rows: dict[str, dict[str, Any]] = {}
    for dtype in ("float32", "bfloat16"):
        place = tmp_path / dtype
        options = ["--scale", "1.0", "--expert-dtype", dtype, "--proxies", "4"]
        assert main(["compare", "-s", str(tiny_suite), "--mergers", "[ESMPP, Average]", *options, "-o", str(place)]) == 0
        results = json.loads((place / "results.json").read_text())
        assert results["expert_dtype"] == dtype
        rows[dtype] = {row["name"]: row for row in results["rows"]}
        assert ("bfloat16" in (place / "report.html").read_text()) == (dtype == "bfloat16")
    assert sorted(merges) == ["Average", "ESMPP", "ESMPP"]
    whole, half = rows["float32"]["ESMPP"], rows["bfloat16"]["ESMPP"]
    assert half["bytes"] == {"task": whole["bytes"]["task"] // 2, "shared": whole["bytes"]["shared"]}
    assert half["settings"]["expert_dtype"] == "bfloat16"
    assert rows["bfloat16"]["Average"]["settings"] == rows["float32"]["Average"]["settings"]


def test_a_tuned_method_is_merged_with_the_dtype_it_was_judged_in(tiny_suite: Path, tmp_path: Path) -> None:
    options = ["--grid", "{rank: [1, 2]}", "--scale", "1.0", "--expert-dtype", "bfloat16", "--proxies", "4"]
    assert main(["tune", "-s", str(tiny_suite), "-m", "ESMPP", *options, "-o", str(tmp_path)]) == 0
    assert yaml.safe_load((tmp_path / "winner.yaml").read_text())["model"]["expert_dtype"] == "bfloat16"
