"""Pre-training of the demo's backbone: strong features, loosely aligned with text, as those of a full-size CLIP are.

A small CLIP trained on captions alone has weak features, so that each expert has to learn its own, and merged experts interfere
far more than full-size ones. This one learns to tell the tasks' classes apart by a linear head on the features *before* the
projection into the space shared with text. CLIP's loss, at a small weight and on few pictures, aligns that space only roughly.
What fine-tuning adds is then mostly the alignment, which experts of one backbone do in much the same way.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_vision.data.preprocess import Preprocess, eval_transform
from mergekit_vision.demo.captions import captioned
from mergekit_vision.demo.optimizing import Recipe, optimize
from mergekit_vision.encoders.backbone import describe_backbone
from mergekit_vision.sources.opening import open_source
from mergekit_vision.suites.suite import Suite
from mergekit_vision.support.console import track
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
class Captions:
    """The captioned pictures that align images with text.

    Attributes:
        images: different pictures.
        batch: pictures a step, drawn at random.
        weight: of CLIP's loss beside the heads' cross-entropy.
    """

    images: int
    batch: int
    weight: float


def pretrain(suite: Suite, place: Path, seed: int, recipe: Recipe, captions: Captions) -> nn.Module:
    """Train a new CLIP on a suite's ``train`` splits and on captioned pictures.

    Args:
        suite: its tasks.
        place: directory of the model; gets its configuration.
        seed: of the captioned pictures. The weights and the order of images follow torch's generator.
        recipe: of the joint training.
        captions: the captioned pictures.

    Returns:
        The CLIP model, without the linear heads.
    """
    import open_clip

    place.mkdir(parents=True, exist_ok=True)
    with replacing(place / "open_clip_config.json") as draft:
        draft.write_text(json.dumps(CONFIG, indent=2) + "\n")
    name = f"local-dir:{place.absolute()}"
    clip: nn.Module = open_clip.CLIP(**CONFIG["model_cfg"]).train()
    tower: Any = clip.visual
    preprocess = eval_transform(describe_backbone(name).preprocess)

    drawn = [draw(suite, task, recipe.images, preprocess) for task in suite.tasks]
    pixels = torch.cat([images for images, _ in drawn])
    # One head for all classes; a task's images choose among its own.
    sizes = [len(task.classes) for task in suite.tasks.values()]
    labels = torch.cat([labels + sum(sizes[:index]) for index, (_, labels) in enumerate(drawn)])
    task_of_class = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    head = nn.Linear(CONFIG["model_cfg"]["vision_cfg"]["width"], sum(sizes))

    items = [captioned(seed, index) for index in track(range(captions.images), "captioned pictures: drawing")]
    pictures = geometry([image for image, *_ in items], preprocess)
    tokens = open_clip.get_tokenizer(name)([caption for _, caption, _ in items])
    meanings = torch.from_numpy(np.unique([meaning for *_, meaning in items], return_inverse=True)[1])

    def loss(batch: Tensor) -> Tensor:
        chosen = torch.randint(len(items), (captions.batch,))
        seen = features(tower, preprocess.finish(torch.cat([pixels[batch], pictures[chosen]])))
        others = task_of_class[labels[batch], None] != task_of_class
        told = F.cross_entropy(head(seen[: len(batch)]).masked_fill(others, -torch.inf), labels[batch])
        images = F.normalize(seen[len(batch) :] @ tower.proj, dim=-1)
        texts = clip.encode_text(tokens[chosen], normalize=True)  # type: ignore[operator]
        return told + captions.weight * contrast(clip.get_parameter("logit_scale").exp() * images @ texts.T, meanings[chosen])

    optimize(nn.ModuleList([clip, head]), loss, len(pixels), recipe, "backbone: pre-training")
    clear_unseen(clip, tokens)
    return clip


def draw(suite: Suite, name: str, count: int, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """The first images of a task's ``train`` split, and their class indices.

    Returns:
        uint8 ``[images, 3, height, width]``, int64 ``[images]``.
    """
    source = open_source(suite.tasks[name].data["train"])
    items = [source[index] for index in track(range(min(count, len(source))), f"{name}: drawing")]
    return geometry([image for image, _ in items], preprocess), torch.tensor([label for _, label in items])


def geometry(images: Sequence[Image.Image], preprocess: Preprocess) -> Tensor:
    """Resized and cropped, uint8 ``[images, 3, height, width]``."""
    return torch.stack([preprocess.geometry(image) for image in images])


def features(tower: Any, images: Tensor) -> Tensor:
    """What a vision tower of open_clip computes before its projection into the space shared with text, ``[images, width]``."""
    projection, tower.proj = tower.proj, None
    try:
        seen: Tensor = tower(images)
    finally:
        tower.proj = projection
    return seen


def contrast(logits: Tensor, meanings: Tensor) -> Tensor:
    """CLIP's loss, except that captions of the same meaning fit each other's pictures (as in UniCL, Yang et al. 2022).

    Args:
        logits: cosines times the logit scale, ``[images, texts]``, of pairs in order.
        meanings: of every pair, integers ``[images]``.

    >>> contrast(torch.zeros(2, 2), torch.tensor([0, 1])).exp()  # as likely as not
    tensor(2.)
    """
    same = (meanings[:, None] == meanings).float()
    target = same / same.sum(1)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def clear_unseen(clip: nn.Module, tokens: Tensor) -> None:
    """Set the embeddings of tokens that no caption holds to zero, which packs well and pretends nothing."""
    table = clip.get_parameter("token_embedding.weight")
    unseen = torch.ones(len(table), dtype=torch.bool)
    unseen[torch.unique(tokens)] = False
    table[unseen] = 0.0
