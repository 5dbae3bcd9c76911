"""Pre-train the demo's tiny CLIP and fine-tune its eight experts: ``python -m mergekit_vision.demo.train --output DIR``.

It is also the worked example of making an expert: :func:`fine_tune` trains the vision tower against a frozen zero-shot head, so
that image embeddings stay comparable with text, and the expert can be merged with others from the same backbone.
"""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mergekit_vision.data.preprocess import eval_transform
from mergekit_vision.demo.optimizing import Recipe, optimize
from mergekit_vision.demo.pretraining import Captions, draw, pretrain
from mergekit_vision.encoders.backbone import describe_backbone, load_clip
from mergekit_vision.encoders.heads import zero_shot_head
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.console import console_output, logger
from mergekit_vision.support.files import replacing

PRETRAINING = Recipe(images=6000, epochs=8, rate=1.5e-3)
CAPTIONS = Captions(images=1000, batch=64, weight=0.1)
FINE_TUNING = Recipe(images=4000, epochs=4, rate=4e-4)


def main() -> None:
    """Train everything and write it in the layout of a suite."""
    parser = argparse.ArgumentParser(prog="python -m mergekit_vision.demo.train", description=__doc__.partition(":")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo-suite"), help="directory of the suite that is written")
    parser.add_argument("--seed", type=int, default=0, help="of weights, captioned pictures and the order of images")
    arguments = parser.parse_args()
    with console_output():
        build(arguments.output, arguments.seed)
        logger.info("try it: mergekit-vision test --suite %s --merger ESM", arguments.output / "suite.yaml")


def build(
    output: Path,
    seed: int = 0,
    pretraining: Recipe = PRETRAINING,
    captions: Captions = CAPTIONS,
    fine_tuning: Recipe = FINE_TUNING,
) -> None:
    """Write ``suite.yaml``, ``model/`` (the backbone) and ``experts/`` into a directory.

    The same seed gives the same images and batches; weights agree up to the rounding of the machine's arithmetic.

    Args:
        output: the directory.
        seed: of weights, captioned pictures and the order of images.
        pretraining: of the backbone, on the tasks' images.
        captions: the captioned pictures of the backbone's pre-training.
        fine_tuning: of each expert.
    """
    output.mkdir(parents=True, exist_ok=True)
    shipped = Path(__file__).with_name("suite.yaml")
    if not (output / shipped.name).exists():
        shutil.copy(shipped, output)
    suite = Suite.load(output / "suite.yaml")
    torch.manual_seed(seed)
    clip = pretrain(suite, output / "model", seed, pretraining, captions)
    save_half(clip.state_dict(), output / "model" / "open_clip_model.safetensors")
    for task in suite.tasks:
        weights = fine_tune(suite, task, fine_tuning)
        save_half({f"visual.{name}": value for name, value in weights.items()}, output / "experts" / f"{task}.safetensors")


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
    pixels, labels = draw(suite, task_name, recipe.images, preprocess)

    def loss(batch: Tensor) -> Tensor:
        embedded = F.normalize(tower(preprocess.finish(pixels[batch])), dim=-1)
        return F.cross_entropy(embedded @ head.T, labels[batch])

    optimize(tower, loss, len(pixels), recipe, f"{task_name}: fine-tuning")
    return tower.state_dict()


def save_half(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as float16."""
    with replacing(path) as draft:
        save_file({name: value.detach().half().contiguous() for name, value in weights.items()}, draft)


if __name__ == "__main__":
    main()
