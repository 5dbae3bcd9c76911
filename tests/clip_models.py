"""Small CLIP models of other libraries, and the same tower in open_clip."""

from typing import Any

import torch
from torch import Tensor, nn

SIZES = {"width": 32, "layers": 2, "heads": 2, "patch": 8, "image": 16, "projection": 24}
"""Of the vision tower."""


def huggingface_config(activation: str = "quick_gelu") -> Any:
    """Configuration of a small CLIPModel of transformers."""
    from transformers import CLIPConfig

    shared = {"hidden_size": SIZES["width"], "intermediate_size": 4 * SIZES["width"], "num_hidden_layers": SIZES["layers"]}
    shared |= {"num_attention_heads": SIZES["heads"], "hidden_act": activation, "projection_dim": SIZES["projection"]}
    vision = {**shared, "image_size": SIZES["image"], "patch_size": SIZES["patch"]}
    text = {**shared, "vocab_size": 49408, "max_position_embeddings": 12, "eos_token_id": 49407, "bos_token_id": 49406}
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=SIZES["projection"])


def huggingface_model(seed: int = 0, activation: str = "quick_gelu") -> Any:
    """A CLIPModel with seeded random weights, biases and norms included."""
    from transformers import CLIPModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(huggingface_config(activation)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def open_clip_tower(quick_gelu: bool = True) -> nn.Module:
    """open_clip's vision tower of the same architecture."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    return VisionTransformer(
        image_size=SIZES["image"],
        patch_size=SIZES["patch"],
        width=SIZES["width"],
        layers=SIZES["layers"],
        heads=SIZES["heads"],
        mlp_ratio=4.0,
        output_dim=SIZES["projection"],
        act_layer=QuickGELU if quick_gelu else nn.GELU,
    ).eval()


def images(count: int = 5, seed: int = 1) -> Tensor:
    """Seeded images ``[count, 3, 16, 16]``, as if preprocessed."""
    return torch.randn(count, 3, SIZES["image"], SIZES["image"], generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def embeddings(weights: Any, quick_gelu: bool = True) -> Tensor:
    """Embeddings of :func:`images` by open_clip's tower with weights under its keys, ``visual.…``."""
    tower = open_clip_tower(quick_gelu)
    tower.load_state_dict({key.removeprefix("visual."): value.float() for key, value in weights.items()})
    return tower(images())


@torch.no_grad()
def their_embeddings(model: Any) -> Tensor:
    """Embeddings of :func:`images` by a CLIPModel or CLIPVisionModelWithProjection of transformers."""
    if hasattr(model, "visual_projection"):
        return model.visual_projection(model.vision_model(pixel_values=images()).pooler_output)
    raise TypeError(type(model).__name__)
