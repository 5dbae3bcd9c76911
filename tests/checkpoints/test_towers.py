"""The vision tower is found whatever wraps it, and never guessed among several."""

from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import open_clip_tower
from torch import Tensor
from torch.distributed.checkpoint import save

from mergekit_vision.checkpoints import ExpertSource, open_expert, open_weights
from mergekit_vision.errors import InputError

TOWER = {key: value.clone() for key, value in open_clip_tower().state_dict().items()}
TEXT = {"text_projection": torch.zeros(2, 2), "logit_scale": torch.tensor(1.0), "ln_final.bias": torch.zeros(2)}


def named(prefix: str, tower: dict[str, Tensor] = TOWER) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tower.items()}


@pytest.mark.parametrize(
    "wrapped",
    [
        named("visual."),
        {**named("visual."), **TEXT},
        named("model.visual."),
        named("module.visual."),
        named("module._orig_mod.visual._fsdp_wrapped_module."),
        named("_forward_module.clip.visual."),
        {"state_dict": named("module.visual."), "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        {"state_dict": named("model.clip.visual."), "hyper_parameters": {"lr": 0.1}, "callbacks": {"x": object}},
        {"model_state_dict": named("image_encoder.model.visual."), "args": ["a", "b"]},
        {"model": named("")},
        named(""),
        {"module": named("visual."), "n_averaged": torch.tensor(3)},
        {"params": {"net": named("backbone.visual.")}},
        [named("visual."), 300, torch.zeros(2)],
        (3, {"state_dict": named("module.visual.")}, [{"lr": 0.1}]),
        {"models": [named("model.")]},
    ],
    ids=range(16),
)
def test_wrappers(tmp_path: Path, wrapped: Any) -> None:
    torch.save(wrapped, tmp_path / "x.pt")
    expert = open_weights(tmp_path / "x.pt")
    assert "unused" not in expert.origin or expert.origin["unused"] == ["n_averaged"]
    assert sorted(expert) == sorted(named("visual."))
    assert all(torch.equal(expert[f"visual.{key}"], value) for key, value in TOWER.items())


def test_averaged_weights_are_taken_only_where_they_are_asked_for_or_alone(tmp_path: Path) -> None:
    averaged = {key: value + 1 for key, value in TOWER.items()}
    torch.save({"state_dict": named("visual."), "state_dict_ema": named("visual.", averaged)}, tmp_path / "x.pt")
    for ema, added in ((None, 0), (False, 0), (True, 1)):
        assert torch.equal(open_expert(ExpertSource(tmp_path / "x.pt", ema=ema))["visual.proj"], TOWER["proj"] + added)
    torch.save({"model_ema": named("visual.", averaged)}, tmp_path / "y.pt")
    assert torch.equal(open_weights(tmp_path / "y.pt")["visual.proj"], TOWER["proj"] + 1)
    with pytest.raises(InputError, match="has no vision tower but of averaged weights"):
        open_expert(ExpertSource(tmp_path / "y.pt", ema=False))


def test_two_towers_are_refused_unless_one_is_named(tmp_path: Path) -> None:
    other = {key: value + 1 for key, value in TOWER.items()}
    torch.save({**named("student.visual."), **named("teacher.visual.", other)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"holds 2 vision towers, named `student\.visual\.…`, `teacher\.visual\.…`; .*`key:`"):
        open_weights(tmp_path / "x.pt")
    expert = open_expert(ExpertSource(tmp_path / "x.pt", key="teacher"))
    assert torch.equal(expert["visual.proj"], TOWER["proj"] + 1)
    assert expert.fingerprint() != open_expert(ExpertSource(tmp_path / "x.pt", key="student")).fingerprint()
    with pytest.raises(InputError, match="no vision tower with names in 'uncle'"):
        open_expert(ExpertSource(tmp_path / "x.pt", key="uncle"))


def test_a_list_of_two_towers_needs_a_key(tmp_path: Path) -> None:
    torch.save((3, named("visual."), named("visual.", {key: value + 1 for key, value in TOWER.items()})), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"2 vision towers, named `1\.visual\.…`, `2\.visual\.…`; choose one by `key:`"):
        open_weights(tmp_path / "x.pt")
    found = open_expert(ExpertSource(tmp_path / "x.pt", key="1."))
    assert torch.equal(dict(found)["visual.proj"], TOWER["proj"])  # type: ignore[call-overload]


def test_what_is_not_used_is_recorded(tmp_path: Path) -> None:
    torch.save({**named("visual."), **TEXT, "classification_head.weight": torch.zeros(2, 2)}, tmp_path / "x.pt")
    assert open_weights(tmp_path / "x.pt").origin["unused"] == ["classification_head.weight"]


def test_differences_are_added_with_their_factor(tmp_path: Path) -> None:
    delta = {key: torch.ones_like(value) for key, value in TOWER.items() if key != "proj"}
    torch.save(named("visual.", delta), tmp_path / "x.pt")
    weights = open_expert(ExpertSource(tmp_path / "x.pt", kind="delta", scale=0.5)).on(named("visual."))
    assert torch.equal(weights["visual.proj"], TOWER["proj"])
    assert torch.equal(weights["visual.conv1.weight"], TOWER["conv1.weight"] + 0.5)
    with pytest.raises(InputError, match="`scale` goes with"):
        open_expert(ExpertSource(tmp_path / "x.pt", scale=0.5))
    for kind, hint in (("lora", "has no LoRA matrices"),):
        with pytest.raises(InputError, match=hint):
            open_expert(ExpertSource(tmp_path / "x.pt", kind=kind))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mp_rank_00_model_states.pt", "DeepSpeed"),
        ("zero_to_fp32.py", "zero_to_fp32"),
        ("__0_0.distcp", "torch.distributed.checkpoint"),
        ("tf_model.h5", "from_tf"),
        ("flax_model.msgpack", "from_flax"),
        ("notes.txt", "no weights"),
    ],
)
def test_directories_in_other_forms_are_refused_with_the_remedy(tmp_path: Path, name: str, hint: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=hint):
        open_weights(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_shard_of_a_distributed_checkpoint_is_called_so(tmp_path: Path) -> None:
    """As PyTorch writes it: an archive of each tensor, one behind the other."""
    save({"model": named("visual.")}, checkpoint_id=tmp_path)
    (shard,) = tmp_path.glob("*.distcp")
    with pytest.raises(InputError, match=r"distcp: is a shard of torch\.distributed\.checkpoint.*dcp_to_torch DIRECTORY FILE"):
        open_weights(shard)
