"""The real experts as other libraries save them: read as the same weights, as accurate by the command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_vision.checkpoints import open_weights
from mergekit_vision.cli.main import main
from mergekit_vision.encoders.backbone import load_clip
from mergekit_vision.encoders.vision import VisionEncoder

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
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=32, patch_size=8, hidden_act="gelu"))
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


IMAGES: int | None = 250
"""Of each task that the command evaluates; ``None`` for all."""


def suite_of(zoo: Path, experts: dict[str, Path], place: Path) -> Path:
    """A suite with these experts and the first images of each ``test`` split."""
    content = yaml.safe_load((zoo / "suite.yaml").read_text())
    for task, entry in content["tasks"].items():
        images = place / "images" / f"{task}.parquet"
        images.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(parquet.read_table(zoo / entry["data"]["test"]["parquet"])[:IMAGES], images)
        entry |= {"expert": str(experts[task]), "data": {"test": {"parquet": str(images)}}}
    (place / "suite.yaml").write_text(yaml.safe_dump(content | {"backbone": f"local-dir:{zoo / 'base'}"}))
    return place / "suite.yaml"


def accuracies(suite: Path, place: Path) -> dict[str, float]:
    """Accuracy in % of each task's expert alone, by the command."""
    found = {}
    for task in TASKS:
        alone = ["--experts", f"[{task}]", "--tasks", f"[{task}]", "--scale", "1"]
        assert main(["test", "-s", str(suite), "-m", "TaskArithmetic", *alone, "-o", str(place)]) == 0
        found[task] = 100 * json.loads((place / "results.json").read_text())["tasks"][task]["accuracy"]
    return found


@pytest.fixture(scope="module")
def originals(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Accuracy in % of each expert as it is."""
    place = tmp_path_factory.mktemp("original")
    return accuracies(suite_of(zoo, {task: zoo / "experts" / f"{task}.safetensors" for task in TASKS}, place), place)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_gives_the_same_experts(zoo: Path, originals: dict[str, float], tmp_path: Path, form: str) -> None:
    pytest.importorskip("peft", reason="needs the library peft")
    base = {key: value.clone() for key, value in VisionEncoder(load_clip(f"local-dir:{zoo / 'base'}").visual).weights().items()}
    converted = {}
    for task in TASKS:
        original = dict(open_weights(zoo / "experts" / f"{task}.safetensors"))
        converted[task] = FORMATS[form](original, base, tmp_path / task)
        read = open_weights(converted[task]).on(base)
        largest = max(float(value.abs().max()) for value in original.values())
        error = max(float((read[key] - value).abs().max()) for key, value in original.items())
        assert error <= (20 * torch.finfo(torch.float32).eps * largest if form == "peft_lora" else 0), task
    found = accuracies(suite_of(zoo, converted, tmp_path), tmp_path)
    print(form, {task: f"{value:.2f}" for task, value in found.items()})
    assert found == pytest.approx(originals, abs=0.05)
