"""The real experts as other libraries save them: each is read as the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_vision.checkpoints import open_weights
from mergekit_vision.data.datamodule import VisionTasks
from mergekit_vision.evaluation.evaluator import Runtime
from mergekit_vision.merging.workbench import Workbench

TASKS = ["mnist", "kmnist", "fashion_mnist", "cifar10", "gtsrb", "fer2013", "dtd10", "flowers5"]
Weights = dict[str, Tensor]


def open_clip_tower(weights: Weights) -> torch.nn.Module:
    from open_clip.transformer import QuickGELU, VisionTransformer

    tower = VisionTransformer(32, 8, 192, 6, 3, 4.0, output_dim=192, act_layer=QuickGELU)
    tower.load_state_dict({key.removeprefix("visual."): value for key, value in weights.items()})
    return tower


def huggingface(weights: Weights, base: Weights, place: Path) -> Path:
    """A model of transformers, whose parameters are set one by one, saved by its own ``save_pretrained``."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "projection_dim": 192,
    }
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=32, patch_size=8))
    tower: Any = model.vision_model
    found = {key.removeprefix("visual."): value for key, value in weights.items()}
    pairs = [
        (tower.embeddings.class_embedding, found["class_embedding"]),
        (tower.embeddings.patch_embedding.weight, found["conv1.weight"]),
        (tower.embeddings.position_embedding.weight, found["positional_embedding"]),
        (model.visual_projection.weight, found["proj"].T),
    ]
    modules = [(tower.pre_layrnorm, "ln_pre"), (tower.post_layernorm, "ln_post")]
    for index, layer in enumerate(tower.encoder.layers):
        block = f"transformer.resblocks.{index}"
        names = ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
        own = (layer.layer_norm1, layer.layer_norm2, layer.self_attn.out_proj, layer.mlp.fc1, layer.mlp.fc2)
        modules += [(module, f"{block}.{name}") for module, name in zip(own, names, strict=True)]
        attention = layer.self_attn
        for part in ("weight", "bias"):
            rows = found[f"{block}.attn.in_proj_{part}"].chunk(3)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            pairs += [(getattr(projection, part), row) for projection, row in zip(projections, rows, strict=True)]
    pairs += [(getattr(module, part), found[f"{name}.{part}"]) for module, name in modules for part in ("weight", "bias")]
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)
    model.save_pretrained(place)
    return place


def peft_lora(weights: Weights, base: Weights, place: Path) -> Path:
    """An adapter of full rank by the SVD of each change; what belongs to no Linear layer is saved whole beside it."""
    import peft

    names = ["in_proj_weight", "c_fc.weight", "c_proj.weight"]
    matrices = [key for key in base if any(key.endswith(name) for name in names)]
    targets = ["attn", "c_fc", "c_proj"]
    model = peft.get_peft_model(open_clip_tower(base), peft.LoraConfig(r=192, lora_alpha=192, target_modules=targets))
    model.save_pretrained(place)
    stored = load_file(place / "adapter_model.safetensors")
    for key in [*matrices, *(key for key in base if key.endswith("out_proj.weight"))]:
        change = (weights[key] - base[key]).double() / (2 if "out_proj" in key else 1)  # as peft adds it twice there
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        module = key.removeprefix("visual.").removesuffix("_weight").removesuffix("in_proj").removesuffix(".weight").rstrip(".")
        name = f"base_model.model.{module.replace('attn.out_proj', 'attn.base_layer.out_proj')}.lora_"
        assert stored[f"{name}B.weight"].shape == left.shape
        stored[f"{name}B.weight"], stored[f"{name}A.weight"] = (left * values).float(), right.float().contiguous()
    adapted = {*matrices, *(key for key in base if key.endswith("out_proj.weight"))}
    whole = {f"base_model.model.{key}": value for key, value in weights.items() if key not in adapted}
    save_file({**{name: value.contiguous() for name, value in stored.items()}, **whole}, place / "adapter_model.safetensors")
    return place


def lightning_checkpoint(weights: Weights, base: Weights, place: Path) -> Path:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"callback": Path("x")})
            self.encoder = torch.compile(open_clip_tower(weights))

    trainer = Trainer(max_epochs=0, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.strategy.connect(Module())
    trainer.save_checkpoint(place / "last.ckpt")
    return place / "last.ckpt"


def torchscript(weights: Weights, base: Weights, place: Path) -> Path:
    place.mkdir()
    torch.jit.trace(open_clip_tower(weights), torch.zeros(1, 3, 32, 32), check_trace=False).save(str(place / "x.pt"))
    return place / "x.pt"


def pickled(weights: Weights, base: Weights, place: Path) -> Path:
    place.mkdir()
    torch.save(open_clip_tower(weights), place / "x.pt", _use_new_zipfile_serialization=False)
    return place / "x.pt"


FORMATS: dict[str, Callable[[Weights, Weights, Path], Path]] = {
    form.__name__: form for form in (huggingface, peft_lora, lightning_checkpoint, torchscript, pickled)
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_experts(zoo: Path, tmp_path: Path, form: str) -> None:
    pytest.importorskip("peft", reason="needs the library peft")
    data = VisionTasks(str(zoo / "suite.yaml"))
    bench = Workbench.open(data, Runtime(torch.device("cpu")))
    base = {key: value.clone() for key, value in bench.base.items()}
    for task in TASKS:
        original = dict(open_weights(zoo / "experts" / f"{task}.safetensors"))
        read = open_weights(FORMATS[form](original, base, tmp_path / task)).on(base)
        if form != "peft_lora":
            assert all(torch.equal(read[key], value) for key, value in original.items()), task
            continue
        scale = max(float(value.abs().max()) for value in original.values())
        error = max(float((read[key] - value).abs().max()) for key, value in original.items())
        assert error <= 20 * torch.finfo(torch.float32).eps * scale, task
        with bench.evaluator.with_weights(read) as evaluator:
            assert evaluator.accuracy(task, "test") == pytest.approx(bench.evaluator.expert_accuracy(task, "test"), abs=5e-4)
