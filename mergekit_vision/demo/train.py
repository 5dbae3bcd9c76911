"""Pre-train the demo's tiny CLIP and fine-tune its eight experts: ``python -m mergekit_vision.demo.train --output DIR``.

It is also the worked example of making an expert: :func:`fine_tune` trains the vision tower against a frozen zero-shot head, so
that image embeddings stay comparable with text, and the expert can be merged with others from the same backbone.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_vision.data.preprocess import eval_transform
from mergekit_vision.demo.captions import captioned
from mergekit_vision.encoders.backbone import describe_backbone, load_clip
from mergekit_vision.encoders.heads import zero_shot_head
from mergekit_vision.sources.opening import open_source
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.console import console_output, logger, track
from mergekit_vision.support.files import replacing

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 96, "layers": 4, "head_width": 32},
        # Most of the text tower is its table of 49408 tokens, which open_clip's tokenizer asks for: hence the narrow width.
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train.

    Attributes:
        images: different images.
        epochs: passes over them.
        rate: highest learning rate, after a warm-up over a twentieth of the steps; a cosine takes it down to 0.
        batch: images a step.
        decay: weight decay of AdamW, on matrices only.
    """

    images: int
    epochs: int
    rate: float
    batch: int = 128
    decay: float = 0.05


PRETRAINING = Recipe(images=40_000, epochs=8, rate=2e-3)
FINE_TUNING = Recipe(images=4_000, epochs=4, rate=5e-4)


def main() -> None:
    """Train everything and write it in the layout of a suite."""
    parser = argparse.ArgumentParser(prog="python -m mergekit_vision.demo.train", description=__doc__.partition(":")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo-suite"), help="directory of the suite that is written")
    parser.add_argument("--seed", type=int, default=0, help="of weights, images and their order")
    arguments = parser.parse_args()
    with console_output():
        build(arguments.output, arguments.seed)
        logger.info("try it: mergekit-vision test --suite %s --merger ESM", arguments.output / "suite.yaml")


def build(output: Path, seed: int = 0, pretraining: Recipe = PRETRAINING, fine_tuning: Recipe = FINE_TUNING) -> None:
    """Write ``suite.yaml``, ``model/`` (the backbone) and ``experts/`` into a directory.

    The same seed gives the same images and batches; weights agree up to the rounding of the machine's arithmetic.

    Args:
        output: the directory.
        seed: of weights, images and their order.
        pretraining: of the backbone.
        fine_tuning: of each expert.
    """
    output.mkdir(parents=True, exist_ok=True)
    shipped = Path(__file__).with_name("suite.yaml")
    if not (output / shipped.name).exists():
        shutil.copy(shipped, output)
    torch.manual_seed(seed)
    clip = pretrain(output / "model", seed, pretraining)
    save_half(clip.state_dict(), output / "model" / "open_clip_model.safetensors")
    suite = Suite.load(output / "suite.yaml")
    for task in suite.tasks:
        weights = fine_tune(suite, task, fine_tuning)
        save_half({f"visual.{name}": value for name, value in weights.items()}, output / "experts" / f"{task}.safetensors")


# ------------------------------------------------------------------------------------------------ an expert


def fine_tune(suite: Suite, task_name: str, recipe: Recipe) -> dict[str, Tensor]:
    """Fine-tune a suite's backbone on one task's ``train`` split.

    Returns:
        The weights of the vision tower.
    """
    import open_clip

    task, clip = suite.tasks[task_name], load_clip(suite.backbone, suite.pretrained)
    tokenizer = open_clip.get_tokenizer(suite.backbone)
    head = zero_shot_head(clip, tokenizer, task.classes, task.templates)  # frozen
    tower = clip.get_submodule("visual").requires_grad_(True).train()

    preprocess = eval_transform(describe_backbone(suite.backbone, suite.pretrained).preprocess)
    source = open_source(task.data["train"])
    count = min(recipe.images, len(source))
    items = [source[index] for index in track(range(count), f"{task_name}: drawing")]
    pixels = torch.stack([preprocess.geometry(image) for image, _ in items])
    labels = torch.tensor([label for _, label in items])

    def loss(batch: Tensor) -> Tensor:
        features = F.normalize(tower(preprocess.finish(pixels[batch])), dim=-1)
        return F.cross_entropy(features @ head.T, labels[batch])

    optimize(tower, loss, count, recipe, f"{task_name}: fine-tuning")
    return tower.state_dict()


def optimize(model: nn.Module, loss: Callable[[Tensor], Tensor], count: int, recipe: Recipe, title: str) -> None:
    """Minimize a loss over batches of indices below ``count`` with AdamW, one warm-up and a cosine."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": recipe.decay},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98))
    batches = [batch for _ in range(recipe.epochs) for batch in torch.split(torch.randperm(count), recipe.batch)]
    warm_up = max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / len(batches))),
    )
    for batch in track(batches, title):
        optimizer.zero_grad()
        torch.autograd.backward(loss(batch))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


# -------------------------------------------------------------------------------------------- the backbone


def pretrain(place: Path, seed: int, recipe: Recipe) -> nn.Module:
    """Train a new CLIP on captioned pictures; ``place`` gets its configuration.

    The loss is CLIP's, except that captions of the same meaning fit each other's pictures (as in UniCL, Yang et al. 2022).
    """
    import open_clip

    place.mkdir(parents=True, exist_ok=True)
    with replacing(place / "open_clip_config.json") as draft:
        draft.write_text(json.dumps(CONFIG, indent=2) + "\n")
    name = f"local-dir:{place.absolute()}"
    clip: nn.Module = open_clip.CLIP(**CONFIG["model_cfg"]).train()
    preprocess = eval_transform(describe_backbone(name).preprocess)
    items = [captioned(seed, index) for index in track(range(recipe.images), "captioned pictures: drawing")]
    pixels = torch.stack([preprocess.geometry(image) for image, *_ in items])
    tokens = open_clip.get_tokenizer(name)([caption for _, caption, _ in items])
    meanings = torch.from_numpy(np.unique([meaning for *_, meaning in items], return_inverse=True)[1])

    def loss(batch: Tensor) -> Tensor:
        images = clip.encode_image(preprocess.finish(pixels[batch]), normalize=True)  # type: ignore[operator]
        texts = clip.encode_text(tokens[batch], normalize=True)  # type: ignore[operator]
        logits = clip.logit_scale.exp() * images @ texts.T  # type: ignore[operator]
        same = (meanings[batch, None] == meanings[batch]).float()
        target = same / same.sum(1)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    optimize(clip, loss, recipe.images, recipe, "backbone: pre-training")
    clear_unseen(clip, tokens)
    return clip


@torch.no_grad()
def clear_unseen(clip: nn.Module, tokens: Tensor) -> None:
    """Set the embeddings of tokens that no caption holds to zero, which packs well and pretends nothing."""
    table = clip.get_parameter("token_embedding.weight")
    unseen = torch.ones(len(table), dtype=torch.bool)
    unseen[torch.unique(tokens)] = False
    table[unseen] = 0.0


def save_half(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as float16."""
    with replacing(path) as draft:
        save_file({name: value.detach().half().contiguous() for name, value in weights.items()}, draft)


if __name__ == "__main__":
    main()
