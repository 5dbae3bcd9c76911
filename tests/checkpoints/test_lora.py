"""LoRA adapters made by peft, against the weights that peft itself merges."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_models import embeddings, huggingface_model, images, open_clip_tower, their_embeddings
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_vision.checkpoints import ExpertSource, open_expert, open_weights
from mergekit_vision.errors import InputError
from mergekit_vision.suites.checks import expert_faults

peft = pytest.importorskip("peft", reason="needs the library peft")
transformers = pytest.importorskip("transformers", reason="needs the library transformers")

TOLERANCE = 1e-5  # of float32 embeddings of order 1 through two blocks
ATTENTION = ["q_proj", "v_proj"]
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def vision_model() -> Any:
    model = transformers.CLIPVisionModelWithProjection(huggingface_model().config.vision_config).eval()
    state = huggingface_model().state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


def adapted(place: Path, around: torch.nn.Module | None = None, name: str = "default", **options: Any) -> Any:
    """A model with a random adapter, saved; every matrix, magnitude and bias that can be trained is moved."""
    model = peft.get_peft_model(vision_model() if around is None else around, peft.LoraConfig(**options), name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(place)
    return model


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Tensor]:
    vision_model().save_pretrained(tmp_path / "base")
    return dict(open_weights(tmp_path / "base"))


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
        {"r": 4, "lora_alpha": 8, "target_modules": EVERYWHERE, "use_rslora": True},
        {"r": 3, "lora_alpha": 5, "target_modules": EVERYWHERE, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"fc1": 11}},
        {"r": 4, "lora_alpha": 8, "target_modules": EVERYWHERE, "use_dora": True},
        {"r": 4, "lora_alpha": 8, "target_modules": ["visual_projection"], "use_dora": True},
        {"r": 4, "lora_alpha": 8, "target_modules": EVERYWHERE, "bias": "all"},
        {"r": 4, "lora_alpha": 8, "target_modules": EVERYWHERE, "lora_bias": True},
        {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "visual_projection"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "modules_to_save": ["visual_projection"]},
    ],
    ids=["qv", "rslora", "patterns", "dora", "dora of the projection", "bias", "lora_bias", "projection", "saved"],
)
def test_adapters_are_what_peft_merges(tmp_path: Path, base: dict[str, Tensor], options: dict[str, Any]) -> None:
    model = adapted(tmp_path / "adapter", **options)
    expert = open_weights(tmp_path / "adapter")
    assert expert.relative
    assert expert.origin["rank"] == options["r"]
    assert {file.name for file in expert.files} == {"adapter_model.safetensors", "adapter_config.json"}
    weights = expert.on(base)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for key, value in open_weights(tmp_path / "merged").items():
        assert torch.allclose(weights[key], value, atol=1e-6), key
        assert expert.shapes.get(key, value.shape) == value.shape
    assert torch.allclose(embeddings(weights), their_embeddings(merged), atol=TOLERANCE)
    check_factors(weights, base, options)
    if options["target_modules"] == ATTENTION:  # what is not adapted stays as it is, to the bit
        width = base["visual.proj"].shape[0]
        keys = [key for key in base if key.endswith("in_proj_weight")]
        assert all(torch.equal(weights[key][width : 2 * width], base[key][width : 2 * width]) for key in keys)


def check_factors(weights: Any, base: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Where the change of a weight is known as a product, it is what the weight differs by, but for rounding."""
    found = {key: pair for key in base if (pair := weights.factors(key)) is not None}
    changed = {key for key in base if base[key].dim() == 2 and not torch.equal(weights[key], base[key])}
    whole = {"visual.proj"} if "modules_to_save" in options else set()
    assert found.keys() == (set() if options.get("use_dora") else changed - whole)
    for key, (up, down) in found.items():
        assert up.shape[1] <= options["r"] * (3 if "in_proj" in key else 1)
        bound = 2 * torch.finfo(torch.float32).eps * float(weights[key].abs().max() + base[key].abs().max())
        assert (up @ down - (weights[key] - base[key])).abs().max() < bound, key


def test_a_model_saved_with_its_adapter_not_merged(tmp_path: Path, base: dict[str, Tensor]) -> None:
    model = adapted(tmp_path / "adapter", r=4, lora_alpha=8, target_modules=ATTENTION)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"without adapter_config\.json.*`scale:`"):
        open_weights(tmp_path / "x.safetensors")
    expert = open_expert(ExpertSource(tmp_path / "x.safetensors", scale=2.0))
    assert all(expert.on(base).factors(key) is None for key in base)  # type: ignore[attr-defined]
    other = {key: torch.zeros_like(value) for key, value in base.items()}  # the file brings its own
    assert torch.allclose(embeddings(expert.on(other)), their_embeddings(model.merge_and_unload()), atol=TOLERANCE)


def not_merged(place: Path, model: Any, without: str = "") -> Any:
    """The whole state of a model with its adapter beside its weights, as an expert."""
    state = {name: value.contiguous() for name, value in model.state_dict().items() if not without or without not in name}
    save_file(state, place / "x.safetensors")
    return open_expert(ExpertSource(place / "x.safetensors", scale=2.0))


def test_the_tower_of_a_model_with_its_adapter_is_checked_as_any_other(tmp_path: Path, base: dict[str, Tensor]) -> None:
    model = adapted(tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["fc1", "visual_projection"])
    shapes = {key: tuple(value.shape) for key, value in base.items()}
    whole = not_merged(tmp_path, model)
    assert (whole.relative, whole.shapes, expert_faults(whole, "it", shapes)) == (False, shapes, [])
    (fault,) = expert_faults(not_merged(tmp_path, model, "layer_norm1"), "it", shapes)
    assert "lacks visual.transformer.resblocks.0.ln_1" in fault
    (fault,) = expert_faults(whole, "it", {**shapes, "visual.positional_embedding": (17, 32)})
    assert "of another architecture: image size 16" in fault
    with pytest.raises(InputError, match=r"c_fc\.weight \(128, 32\), and the tower in the same file lacks it"):
        not_merged(tmp_path, model, "fc1.base_layer.weight")
    part = not_merged(tmp_path, model, "visual_projection.")  # without a projection, of which it says so
    assert (expert_faults(part, "it", shapes), part.origin["projection"]) == ([], "the backbone's")


@pytest.mark.parametrize("name", ["default", "cars", "v1+x"])
def test_what_was_trained_beside_an_adapter_with_a_name(tmp_path: Path, base: dict[str, Tensor], name: str) -> None:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "modules_to_save": ["visual_projection"]}
    model = adapted(tmp_path / "adapter", name=name, **options)
    expert = not_merged(tmp_path, model)
    assert torch.allclose(embeddings(expert.on(base)), their_embeddings(model.merge_and_unload()), atol=TOLERANCE)


def test_a_model_with_a_head_around_an_adapter_not_merged(tmp_path: Path, base: dict[str, Tensor]) -> None:
    """As published for KnOTS: the whole encoder of peft as a member, with its tower, and a linear head."""
    options = {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION, "modules_to_save": ["post_layernorm"]}
    model = adapted(tmp_path / "adapter", **options)
    whole = torch.nn.ModuleDict({"vision_model": model, "vision_head": torch.nn.Linear(24, 3)})
    torch.save(whole.state_dict(), tmp_path / "x.pt")
    expert = open_expert(ExpertSource(tmp_path / "x.pt", scale=1.0))
    assert expert.origin["unused"] == ["vision_head.weight", "vision_head.bias"]
    weights = expert.on({key: torch.zeros_like(value) for key, value in base.items()})
    assert torch.allclose(embeddings(weights), their_embeddings(model.merge_and_unload()), atol=TOLERANCE)


class Wrapped(torch.nn.Module):
    """A tower as a member of another model."""

    def __init__(self, name: str, tower: torch.nn.Module) -> None:
        super().__init__()
        self.add_module(name, tower)


@pytest.mark.parametrize("name", ["encoder", "backbone", "vision_tower", "visual"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_tower_may_be_a_member_of_any_name(tmp_path: Path, base: dict[str, Tensor], name: str, apart: bool) -> None:
    options = {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, "visual_projection"]}
    model = adapted(tmp_path, Wrapped(name, vision_model()), **options, modules_to_save=["post_layernorm"])
    expert = open_weights(tmp_path) if apart else not_merged(tmp_path, model)
    assert torch.allclose(embeddings(expert.on(base)), their_embeddings(getattr(model.merge_and_unload(), name)), atol=TOLERANCE)


@pytest.mark.parametrize(
    "pattern", ["clip.vision_model.encoder.layers.0.self_attn.q_proj", "^clip.vision_model.encoder.layers.1.self_attn.v_proj$"]
)
def test_patterns_may_name_what_wraps_the_tower(tmp_path: Path, base: dict[str, Tensor], pattern: str) -> None:
    patterns = {"rank_pattern": {pattern: 2}, "alpha_pattern": {pattern: 32}}
    options = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **patterns}
    model = adapted(tmp_path, Wrapped("clip", vision_model()), **options)
    weights = open_weights(tmp_path).on(base)
    assert torch.allclose(embeddings(weights), their_embeddings(model.merge_and_unload().clip), atol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "changed", "apart"),
    [
        ({}, 6, True),  # of two blocks: in_proj, out_proj, c_fc
        ({"rank_pattern": {"attn": 2}, "alpha_pattern": {"0.attn": 5}}, 6, True),
        ({"modules_to_save": ["ln_post"]}, 8, True),
        ({"modules_to_save": ["ln_post"]}, 8, False),
        ({"bias": "all"}, 18, True),  # and five biases of each block, without in_proj's, and two around them
    ],
    ids=str,
)
def test_an_adapter_of_open_clips_own_tower(tmp_path: Path, options: dict[str, Any], changed: int, apart: bool) -> None:
    tower = open_clip_tower()
    base = {f"visual.{key}": value.clone() for key, value in tower.state_dict().items()}
    model = peft.get_peft_model(tower, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["attn", "c_fc"], **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "in_proj_bias" not in name:  # which peft trains and does not save
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(tmp_path)
    weights = (open_weights(tmp_path) if apart else not_merged(tmp_path, model)).on(base)
    assert torch.allclose(embeddings(weights), model.eval()(images()), atol=TOLERANCE)
    merged = {f"visual.{key}": value for key, value in model.merge_and_unload().state_dict().items()}
    assert all(torch.allclose(weights[key], merged[key], atol=1e-6) for key in base)
    assert sum(not torch.equal(weights[key], base[key]) for key in base) == changed


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"peft_type": "IA3"}, "of the kind IA3"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"use_qalora": True}, "uses use_qalora"),
        ({"r": 7}, r"gives .* the rank 7, but its matrices have 4"),
        ({"lora_alpha": "many"}, "lora_alpha must be a number"),
        ({"rank_pattern": {"(a+)+$": 1}}, "only names of layers"),
        ({"rank_pattern": [1]}, "must be an object"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tmp_path: Path, change: dict[str, Any], hint: str) -> None:
    adapted(tmp_path, r=4, lora_alpha=8, target_modules=ATTENTION)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=rf"adapter_config\.json: .*{hint}"):
        open_weights(tmp_path)


def test_fan_in_fan_out_is_ignored_as_peft_does_for_linear_layers(tmp_path: Path, base: dict[str, Tensor]) -> None:
    adapted(tmp_path, r=4, lora_alpha=8, target_modules=ATTENTION)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": True}))
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = peft.PeftModel.from_pretrained(vision_model(), tmp_path)
    weights = open_weights(tmp_path).on(base)
    assert torch.allclose(embeddings(weights), their_embeddings(model.merge_and_unload()), atol=TOLERANCE)


def test_adapters_of_other_layers_are_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(huggingface_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(InputError, match=r"adapts the text tower \(text_model"):
        open_weights(tmp_path / "both")
    head = "base_model.model.lm_head.lora_"
    tensors = {f"{head}A.weight": torch.zeros(2, 4), f"{head}B.weight": torch.zeros(4, 2)}
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(InputError, match="adapts lm_head, which is not a Linear layer of CLIP's vision tower"):
        open_expert(ExpertSource(tmp_path / "head.safetensors", scale=1.0))
    save_file({name: value for name, value in tensors.items() if "lora_A" in name}, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match="lm_head lacks lora_A or lora_B"):
        open_expert(ExpertSource(tmp_path / "half.safetensors", scale=1.0))


@pytest.mark.parametrize("told", [True, False])
def test_clip_lora_scales_by_the_root_of_the_rank(tmp_path: Path, base: dict[str, Tensor], told: bool) -> None:
    width, rank, alpha = base["visual.proj"].shape[0], 2, 3
    generator, shapes = torch.Generator().manual_seed(0), {"A": (rank, width), "B": (width, rank)}
    layers = {
        f"layer_{block}": {
            part: {f"w_lora_{which}": torch.randn(shape, generator=generator) for which, shape in shapes.items()}
            for part in ("q_proj", "v_proj", "proj")
        }
        for block in range(2)
    }
    metadata = {"r": rank, "alpha": alpha, "encoder": "vision", "params": ["q", "v", "o"], "position": "all"}
    torch.save({"weights": layers, "metadata": metadata}, tmp_path / "x.pt")
    expert = open_expert(ExpertSource(tmp_path / "x.pt", scale=None if told else 0.25))
    factor = alpha / math.sqrt(rank) if told else 0.25
    for block in range(2):
        place = f"visual.transformer.resblocks.{block}.attn"
        products = {part: factor * pair["w_lora_B"] @ pair["w_lora_A"] for part, pair in layers[f"layer_{block}"].items()}
        change = torch.cat([products["q_proj"], torch.zeros(width, width), products["v_proj"]])
        weights = expert.on(base)
        assert torch.allclose(weights[f"{place}.in_proj_weight"], base[f"{place}.in_proj_weight"] + change, atol=1e-5)
        assert torch.allclose(weights[f"{place}.out_proj.weight"], base[f"{place}.out_proj.weight"] + products["proj"], atol=1e-5)
    torch.save({"weights": layers, "metadata": {**metadata, "encoder": "both"}}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="encoder 'both'"):
        open_weights(tmp_path / "x.pt")


def test_factors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    adapted(tmp_path, r=4, lora_alpha=8, target_modules=ATTENTION)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: tensors[name][:, :3].contiguous()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="are not two factors of one matrix"):
        open_weights(tmp_path)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="is stored as int8"):
        open_weights(tmp_path)
