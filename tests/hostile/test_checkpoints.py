"""Checkpoints from anyone: an expert, or an ``InputError`` that names the file, and nothing else.

A case is how the file is made, and what its message says; ``SOUND`` where it is an expert that fits its backbone, ``OPENS``
where it opens and is found not to fit by its shapes.
"""

from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest
import torch
from checkpoint_files import BASE, FULL, TEXT, WIDTH, Make, adapter, clip_lora, directory, huggingface, lora, named, saved
from hostile_files import ARCHIVES, LEGACY, OPENS, PICKLES, SAFETENSORS, SOUND
from safetensors.torch import save_file
from torch import Tensor

from mergekit_vision.checkpoints import ExpertSource, open_expert
from mergekit_vision.checkpoints.opening import open_container
from mergekit_vision.checkpoints.peft_lora import peft_adapter
from mergekit_vision.errors import InputError
from mergekit_vision.suites.checks import expert_faults

SHAPES = {key: tuple(value.shape) for key, value in BASE.items()}
Q = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj"
HEAD = {"classification_head.weight": torch.zeros(2, 2)}


def biases(last: Tensor, parts: str = "qv") -> dict[str, Tensor]:
    """Biases of a block's attention that an adapter holds whole: ones, and the last as it is given."""
    values = [torch.ones(WIDTH)] * (len(parts) - 1) + [last]
    return {f"{Q.removesuffix('q_proj')}{part}_proj.bias": value for part, value in zip(parts, values, strict=True)}


def of_class(name: str) -> dict[str, str]:
    """What peft writes of the class of a model that it was given."""
    return {"base_model_class": name, "parent_library": "transformers.models.any.modeling"}


LAYOUTS: dict[str, tuple[Make, str]] = {
    "OpenAI's state dictionary in float16": (
        saved(
            {key: value.half() for key, value in FULL.items()}
            | {"input_resolution": torch.tensor(16), "vocab_size": torch.tensor(50)}
        ),
        SOUND,
    ),
    "text apart": (saved(named("visual.") | named("text.", TEXT)), SOUND),
    "a text tower as wide, alone": (saved(TEXT), "no patch embedding"),
    "both towers without a prefix": (saved({**TEXT, **named("")}), "has unknown visual.text_projection"),
    "CoCa": (saved({**FULL, "visual.attn_pool.query": torch.zeros(2, 2)}), "has unknown visual.attn_pool.query"),
    "timm": (saved({"visual.trunk.patch_embed.proj.weight": torch.zeros(4, 3, 2, 2)}), "a tower of timm"),
    "a ResNet": (
        saved({"visual.conv1.weight": torch.zeros(4, 3, 3, 3), "visual.layer1.0.bn1.weight": torch.zeros(4)}),
        "a ResNet",
    ),
    "Lightning with two models": (saved({"state_dict": named("student.") | named("teacher.")}), "holds 2 vision towers"),
    "one of two models": (saved({"state_dict": named("student.") | named("teacher.")}, key="state_dict.student"), SOUND),
    "two thousand models": (
        saved({f"m{index}.conv1.weight": torch.zeros(1, 3, 1, 1) for index in range(2000)}),
        "m3.…` and more",
    ),
    "two thousand models in a delta": (
        saved({f"m{index}.visual.proj": torch.zeros(1) for index in range(2000)}, kind="delta"),
        "holds 2000 vision towers",
    ),
    "one model by its own names and a wrapper's": (saved(FULL | named("visual._orig_mod.")), "holds 2 vision towers"),
    "FSDP and compile in the middle": (
        saved(
            {key.replace(".1.", ".1._fsdp_wrapped_module._orig_mod."): value for key, value in named("module.visual.").items()}
        ),
        SOUND,
    ),
    "averaged weights alone": (saved({"ema_model": named("module.visual."), "step": 3}), SOUND),
    "AveragedModel": (saved({**named("module.visual."), "n_averaged": torch.tensor(3)}), SOUND),
    "TALL": (saved({**named("model.visual."), "model.logit_scale": torch.tensor(1.0), "model_name": "ViT-B-32"}), SOUND),
    "linearized": (saved({"model.params.0": torch.zeros(2), "model.params0.0": torch.zeros(2)}), "a linearized model"),
    "a head": (saved(HEAD), "holds a classification head"),
    "a head beside a tower": (saved({**named("image_encoder.visual."), **HEAD}), SOUND),
    "a temperature alone": (saved({"logit_scale": torch.tensor(1.0)}), "no patch embedding"),
    "a part of a text tower": (saved({"text_model.final_layer_norm.weight": torch.zeros(2)}), "no patch embedding"),
    "one tensor": (saved(torch.zeros(3)), "a single tensor without a name"),
    "a list": (saved([named("visual.")]), SOUND),
    "a list of tensors": (saved([torch.zeros(2), torch.zeros(2)]), "holds no tensors under names"),
    "a list of two towers": (saved((named("visual."), named("visual."))), "choose one by `key:`"),
    "lists in lists": (saved(reduce(lambda inner, _: [inner], range(100), [FULL])), "holds no tensors"),
    "a vector for a patch embedding": (
        saved({"visual.conv1.weight": torch.zeros(3), "visual.positional_embedding": torch.zeros(5, 2)}, kind="delta"),
        "has other shapes than the backbone",
    ),
    "single numbers for thirds of attention": (
        saved({key: torch.tensor(1.0) if "0.self_attn" in key else value for key, value in huggingface().items()}),
        "not of one attention layer",
    ),
    "a scalar for a matrix": (saved({**FULL, "visual.proj": torch.tensor(1.0)}), "visual.proj is ()"),
    "expanded": (saved({**FULL, "visual.proj": torch.zeros(1).expand(WIDTH, 24)}), "visual.proj is not a plain tensor"),
    "integers": (saved({**FULL, "visual.proj": torch.zeros(WIDTH, 24, dtype=torch.int64)}), "stored as int64"),
    "a delta without the patch embedding": (saved({"visual.proj": torch.zeros(WIDTH, 24)}, kind="delta"), SOUND),
    "a delta of two towers": (saved({"a.visual.proj": torch.zeros(2), "b.visual.proj": torch.zeros(2)}, kind="delta"), "holds 2"),
    "a delta of nothing": (saved({"weights": torch.zeros(2)}, kind="delta"), "holds"),
    "transformers": (saved(huggingface() | named("text_model.", {"embeddings.position_ids": torch.arange(12)})), SOUND),
    "transformers with position_ids": (saved(huggingface() | {"vision_model.embeddings.position_ids": torch.arange(5)}), SOUND),
    "transformers without a prefix": (saved(huggingface("", None)), SOUND),
    "a dual encoder": (saved(huggingface("vision_model.vision_model.")), SOUND),
    "transformers for classes": (
        saved(huggingface("model.vision_model.") | {"model.classifier.weight": torch.zeros(2)}),
        "ForImageClass",
    ),
    "transformers without a third of attention": (
        saved({key: value for key, value in huggingface().items() if "0.self_attn.k_proj.bias" not in key}),
        "not query, key and value",
    ),
    "one parameter by two names": (
        saved(huggingface() | {"vision_model.pre_layernorm.bias": torch.zeros(WIDTH)}),
        "one parameter stored twice",
    ),
}

DIRECTORIES: dict[str, tuple[Make, str]] = {
    "a usual one": (
        directory({"model.safetensors": huggingface(), "config.json": {"model_type": "clip", "vision_config": None}}),
        SOUND,
    ),
    "weights of two libraries": (directory({"pytorch_model.bin": {}, "model.safetensors": huggingface()}), SOUND),
    "an index of pickles": (
        directory(
            {"a.bin": huggingface(), "pytorch_model.bin.index.json": {"weight_map": dict.fromkeys(huggingface(), "a.bin")}}
        ),
        SOUND,
    ),
    "an index of itself": (
        directory({"model.safetensors.index.json": {"weight_map": {"a": "model.safetensors.index.json"}}}),
        "not one of weights beside it",
    ),
    "an index of files above": (
        directory({"model.safetensors.index.json": {"weight_map": {"a": "../x"}}}),
        "not one of weights beside it",
    ),
    "an index of the directory above": (
        directory({"model.safetensors.index.json": {"weight_map": {"a": ".."}}}),
        "not a file of weights",
    ),
    "an index of NUL": (directory({"model.safetensors.index.json": {"weight_map": {"a": "a\0"}}}), "null byte"),
    "an index of numbers": (directory({"model.safetensors.index.json": {"weight_map": {"a": 1}}}), "no `weight_map`"),
    "an index of nothing": (directory({"model.safetensors.index.json": {"weight_map": {}}}), "holds no tensors"),
    "an index that is a list": (directory({"model.safetensors.index.json": []}), "holds a list, not a JSON object"),
    "an index without end": (directory({"model.safetensors.index.json": b"[" * 10**5}), "not valid JSON"),
    "an index of a missing file": (directory({"model.safetensors.index.json": {"weight_map": {"a": "b.bin"}}}), "cannot be read"),
    "an index of tensors that are not there": (
        directory({"a.bin": {}, "pytorch_model.bin.index.json": {"weight_map": {"visual.proj": "a.bin"}}}),
        "lacks visual.proj",
    ),
    "two files": (directory({"a.pt": FULL, "b.pt": FULL}), "several files may hold the weights"),
    "another model": (directory({"model.safetensors": huggingface(), "config.json": {"model_type": "siglip"}}), "not of CLIP"),
    "a training script's configuration": (directory({"x.pt": FULL, "config.json": {"model_type": "ViT-B-32"}}), SOUND),
    "a training script's configuration in another format": (directory({"x.pt": FULL, "config.json": b"lr = 1e-5"}), SOUND),
    "a list as vision_config": (
        directory({"model.safetensors": huggingface(), "config.json": {"model_type": "clip", "vision_config": [1]}}),
        "must be an object",
    ),
    "a configuration that is damaged": (
        directory({"model.safetensors": huggingface(), "config.json": b"{"}),
        "not valid JSON",
    ),
    "DeepSpeed": (directory({"mp_rank_00_model_states.pt": FULL}), "zero_to_fp32.py"),
    "nothing": (directory({}), "no weights in this directory"),
}

ADAPTERS: dict[str, tuple[Make, str]] = {
    "a usual one": (adapter(lora(Q)), SOUND),
    "in a pickle": (
        directory({"adapter_model.bin": lora(Q), "adapter_config.json": {"peft_type": "LORA", "r": 2, "lora_alpha": 1}}),
        SOUND,
    ),
    "names by pattern": (adapter(lora(Q, 3), rank_pattern={"vision_model.encoder.layers.0.self_attn.q_proj": 3}), SOUND),
    "an expression as a pattern": (adapter(lora(Q), rank_pattern={"(a+)+$": 3}), "only names of layers"),
    "layers of another model": (adapter(lora("base_model.model.bert.encoder.layer.0.query")), "not a Linear layer of CLIP's"),
    "the text tower": (adapter(lora(Q.replace("vision", "text"))), "adapts the text tower"),
    "two adapters": (adapter(lora(Q, adapter=".a") | lora(Q, adapter=".b")), "holds 2 adapters (a, b)"),
    "one layer of two towers": (
        adapter(lora(Q) | lora(Q.replace("vision_model", "teacher.vision_model"))),
        "of more than one tower",
    ),
    "half a pair": (adapter({f"{Q}.lora_A.weight": torch.ones(2, WIDTH)}), "lacks lora_A or lora_B"),
    "factors of two ranks": (adapter(lora(Q) | {f"{Q}.lora_A.weight": torch.ones(3, WIDTH)}, r=3), "are not two factors"),
    "factors of another height than another's": (
        adapter(lora(Q) | lora(Q.replace("q_proj", "v_proj"), out=16)),
        "in_proj_weight (48, 32), and others for (96, 32)",
    ),
    "a factor that is one number": (adapter(lora(Q) | {f"{Q}.lora_A.weight": torch.tensor(1.0)}), "no factor of a matrix"),
    "factors of rank 0": (adapter(lora(Q, rank=0), r=0), "no factor of a matrix"),
    "a change of the bias in a column": (
        adapter(lora(Q) | {f"{Q}.lora_B.bias": torch.ones(WIDTH, 1)}, lora_bias=True),
        "does not have a number for each of 32 rows",
    ),
    "biases of one attention layer": (adapter(lora(Q) | biases(torch.ones(WIDTH))), SOUND),
    "a bias of one number": (adapter(lora(Q) | biases(torch.ones(1))), "not of one attention layer"),
    "a bias without an axis": (adapter(lora(Q) | biases(torch.tensor(1.0), "v")), "not of one attention layer"),
    "a bias of integers": (adapter(lora(Q) | biases(torch.ones(WIDTH, dtype=torch.int8))), "stored as int8"),
    "a bias of one number beside a change of it": (
        adapter(lora(Q) | biases(torch.ones(1), "v") | {f"{Q}.lora_B.bias": torch.ones(WIDTH)}, lora_bias=True),
        "in_proj_bias (96,), and others for (3,)",
    ),
    "a bias by two names": (
        adapter(lora(Q) | biases(torch.ones(WIDTH)) | {"vision_model.encoder.layers.0.self_attn.q_proj.bias": torch.ones(WIDTH)}),
        "one parameter stored twice",
    ),
    "factors of another width": (adapter(lora(Q, out=7)), "has other shapes than the backbone"),
    "another rank": (adapter(lora(Q), r=7), "gives vision_model.encoder.layers.0.self_attn.q_proj the rank 7"),
    "a rank as text": (adapter(lora(Q), r="2"), "the rank '2', but its matrices have 2"),
    "a giant alpha": (adapter(lora(Q), lora_alpha=10**400), "lora_alpha must be a number"),
    "an alpha that is none": (adapter(lora(Q), lora_alpha=float("nan")), "lora_alpha must be a number, not nan"),
    "a switch as text": (adapter(lora(Q), use_rslora="false"), "use_rslora must be true or false"),
    "DoRA without magnitudes": (adapter(lora(Q), use_dora=True), "lacks its lora_magnitude_vector"),
    "DoRA with few magnitudes": (
        adapter(lora(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(3)}, use_dora=True),
        "does not have a number for each of 32 rows",
    ),
    "DoRA": (adapter(lora(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(WIDTH)}, use_dora=True), SOUND),
    "magnitudes alone": (adapter({f"{Q}.lora_magnitude_vector": torch.ones(WIDTH)}), "has no LoRA matrices"),
    "PiSSA": (adapter(lora(Q), init_lora_weights="pissa_niter_4"), "changes the weights that the adapter is added to"),
    "a list for the class of a model": (adapter(lora(Q), auto_mapping=[1]), "auto_mapping must be an object"),
    "SigLIP": (adapter(lora(Q), auto_mapping=of_class("SiglipVisionModel")), "an adapter of the class SiglipVisionModel"),
    "CLIP": (adapter(lora(Q), auto_mapping=of_class("CLIPVisionModelWithProjection")), SOUND),
    "IA3": (adapter(lora(Q), peft_type="IA3"), "of the kind IA3"),
    "weights beside it that nobody knows": (
        adapter({**lora(Q), "base_model.model.classifier.bias": torch.ones(2)}),
        "no parameter of CLIP",
    ),
    "no configuration": (directory({"x.safetensors": lora(Q)}), "without adapter_config.json"),
    "a configuration that is a list": (
        directory({"adapter_model.safetensors": lora(Q), "adapter_config.json": []}),
        "not a JSON object",
    ),
    "a model around an adapter": (
        saved(
            {**huggingface("vision_model.base_model.model.", None), "vision_head.weight": torch.zeros(2, 24)}
            | lora("vision_model.base_model.model.encoder.layers.1.mlp.fc2", adapter=".default", out=WIDTH)
            | {"vision_model.base_model.model.encoder.layers.1.mlp.fc2.lora_A.default.weight": torch.ones(2, 4 * WIDTH)},
            scale=1.0,
        ),
        SOUND,
    ),
    "a classifier around an adapter": (
        saved(
            huggingface("base_model.model.vision_model.", None)
            | {"base_model.model.classifier.original_module.weight": torch.zeros(2, WIDTH)}
            | lora(Q, adapter=".default"),
            scale=1.0,
        ),
        "is a CLIPForImageClassification",
    ),
    "CLIP-LoRA": (clip_lora(2), SOUND),
    "CLIP-LoRA of rank 0": (clip_lora(r=0, rank=0), "lack `r` or `alpha`"),
    "CLIP-LoRA of both encoders": (clip_lora(encoder="both"), "encoder 'both'"),
    "CLIP-LoRA of some blocks": (clip_lora(position="top3"), "position 'top3'"),
    "CLIP-LoRA of more blocks": (clip_lora(5), "has unknown visual.transformer.resblocks.2"),
    "CLIP-LoRA of another rank": (clip_lora(r=7), "metadata give the rank 7"),
    "CLIP-LoRA of other layers": (clip_lora(params=["q", "k", "v"]), "name the layers q, k, v, and it holds q, v"),
    "CLIP-LoRA of alpha NaN": (clip_lora(alpha=float("nan")), "lack `r` or `alpha`"),
    "CLIP-LoRA of the MLP": (clip_lora(parts=("q_proj", "c_fc")), "not all of its tensors are factors"),
}

GROUPS = {
    "pickle": PICKLES,
    "legacy": LEGACY,
    "archive": ARCHIVES,
    "safetensors": SAFETENSORS,
    "layout": LAYOUTS,
    "directory": DIRECTORIES,
    "adapter": ADAPTERS,
}
CASES = [pytest.param(*case, id=f"{group}: {name}") for group, cases in GROUPS.items() for name, case in cases.items()]


def outcome(source: ExpertSource) -> str:
    """What is found of a checkpoint: by opening it, beside a backbone, and when all weights are read."""
    try:
        expert = open_expert(source)
    except InputError as error:
        return str(error)
    if faults := expert_faults(expert, str(expert.path), SHAPES):
        return "; ".join(faults)
    weights = expert.on(BASE)
    assert {key: tuple(weights[key].shape) for key in BASE} == SHAPES
    return SOUND


@pytest.mark.parametrize(("make", "expected"), CASES)
def test_a_checkpoint_is_an_expert_or_is_refused(
    tmp_path: Path, make: Make, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = make(tmp_path)
    before = set(tmp_path.iterdir())
    found = outcome(made if isinstance(made, ExpertSource) else ExpertSource(made))
    assert "is of another architecture" in found if expected == OPENS else expected in found
    assert found == SOUND or found.startswith(str(tmp_path))
    assert len(found) < 1500
    assert set(tmp_path.iterdir()) == before, "a hostile file wrote one of its own"


class Counted(dict[str, object]):
    """Entries of a file; how often somebody began to go through them."""

    begun = 0

    def __iter__(self) -> Iterator[str]:
        self.begun += 1
        return super().__iter__()


def test_adapters_of_very_many_layers_take_time_in_proportion(tmp_path: Path) -> None:
    begun = []
    for count in (1, 50):
        layers = [lora(f"vision_model.encoder.layers.{index}.mlp.fc1") for index in range(count)]
        save_file({name: value for layer in layers for name, value in layer.items()}, tmp_path / "x.safetensors")
        container = open_container(tmp_path / "x.safetensors")
        container.entries = entries = Counted(container.entries)
        assert len(peft_adapter(container, None, 1.0, None).shapes) == count
        begun.append(entries.begun)
    assert begun[0] == begun[1] > 0
