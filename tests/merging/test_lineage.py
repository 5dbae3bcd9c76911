"""Experts beside the backbone."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_vision.checkpoints import Expert, ExpertSource, open_expert
from mergekit_vision.errors import InputError
from mergekit_vision.evaluation.evaluator import Evaluator
from mergekit_vision.merging.lineage import check_lineage, distance, lineage_remarks
from mergekit_vision.merging.workbench import Workbench


def expert(place: Path, weights: dict[str, Tensor], **options: object) -> Expert:
    save_file({key: value.contiguous() for key, value in weights.items()}, place / "x.safetensors")
    return open_expert(ExpertSource(place / "x.safetensors", **options))


def check(bench: Workbench, found: Expert) -> None:
    evaluator: Evaluator = bench.evaluator
    check_lineage({"mine": found}, bench.base, evaluator.encoder.linears)


def test_distance_is_that_of_the_joined_vectors(bench: Workbench) -> None:
    other = {key: value + 0.1 for key, value in bench.base.items()}
    keys = [key for key in bench.base if key.endswith("out_proj.weight")]
    a, b = (torch.cat([weights[key].flatten().double() for key in keys]) for weights in (other, bench.base))
    found = distance(other, bench.base, keys)
    expected = (a @ b / (a.norm() * b.norm()), (a - b).norm() / b.norm(), a.norm() / b.norm())
    assert found == pytest.approx([float(value) for value in expected], rel=1e-5)


def test_sound_experts_pass(bench: Workbench) -> None:
    experts = bench.evaluator.data.suite.experts
    check_lineage({task: experts[task] for task in experts}, bench.base, bench.evaluator.encoder.linears)


def test_an_expert_of_another_model_is_refused(bench: Workbench, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    other = {key: torch.randn(value.shape, generator=generator) * value.abs().mean() for key, value in bench.base.items()}
    with pytest.raises(InputError, match=r"task mine .*not fine-tuned from this backbone \(cosine to the backbone -?0\.\d+"):
        check(bench, expert(tmp_path, other))


def test_a_tower_of_another_model_is_refused_with_its_adapter_beside_it(bench: Workbench, tmp_path: Path) -> None:
    generator, layer = torch.Generator().manual_seed(9), "transformer.resblocks.0.mlp.c_fc"
    rows, columns = bench.base[f"visual.{layer}.weight"].shape
    factors = {"A": torch.zeros(2, columns), "B": torch.zeros(rows, 2)}
    change = {f"visual.{layer}.lora_{which}.default.weight": value for which, value in factors.items()}
    check(bench, expert(tmp_path, {**bench.base, **change}, scale=1.0))
    other = {key: torch.randn(value.shape, generator=generator) * value.abs().mean() for key, value in bench.base.items()}
    with pytest.raises(InputError, match=r"task mine .*not fine-tuned from this backbone"):
        check(bench, expert(tmp_path, {**other, **change}, scale=1.0))


def test_differences_and_weights_are_told_apart(bench: Workbench, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    delta = {key: 0.1 * torch.randn(value.shape, generator=generator) * value.std() for key, value in bench.base.items()}
    with pytest.raises(InputError, match=r"looks like differences .*say `kind: delta`"):
        check(bench, expert(tmp_path, delta))
    check(bench, expert(tmp_path, delta, kind="delta"))
    whole = {key: value + delta[key] for key, value in bench.base.items()}
    with pytest.raises(InputError, match=r"looks like whole weights .*leave out `kind: delta`"):
        check(bench, expert(tmp_path, whole, kind="delta"))
    check(bench, expert(tmp_path, whole))


def test_nan_is_named(bench: Workbench, tmp_path: Path) -> None:
    weights = dict(bench.base)
    key = next(key for key in weights if key.endswith("out_proj.weight"))
    weights[key] = torch.full_like(weights[key], torch.nan)
    with pytest.raises(InputError, match="holds NaN or infinity"):
        check(bench, expert(tmp_path, weights))


def test_oddities_are_warned_about(bench: Workbench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    check(bench, expert(tmp_path, {**bench.base, "head.weight": torch.zeros(2, 2)}))
    assert "the expert of task mine has tensors that are not used: head.weight" in caplog.text
    assert "the expert of task mine equals the backbone" in caplog.text


@pytest.mark.parametrize(
    ("trained_on", "warned"),
    [
        ("openai/clip-vit-base-patch16", True),
        ("hf-hub:timm/vit_base_patch32_clip_224.openai", True),
        ("models/ViT-B-32", True),
        ("org/clip-vit-base-patch8", False),
        ("my-model-32", False),
    ],
)
def test_an_adapter_of_a_model_with_other_patches_is_told_of(
    bench: Workbench, tmp_path: Path, trained_on: str, warned: bool
) -> None:
    found = expert(tmp_path, {"visual.proj": bench.base["visual.proj"]}, kind="delta")
    found.origin["base_model"] = trained_on
    assert bench.base["visual.conv1.weight"].shape[-1] == 8
    remarks = [text for text in lineage_remarks(found, bench.base, bench.base) if "patches" in text]
    told = f"was trained on {trained_on}, as its configuration says, and the backbone's patches are 8 pixels wide"
    assert remarks == [told] * warned
