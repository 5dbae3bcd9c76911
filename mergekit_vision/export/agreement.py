"""Whether an exported model computes what ours does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mergekit_vision.encoders.routed import RoutedLinear
from mergekit_vision.errors import InputError
from mergekit_vision.export.merged import MergedModel

TOLERANCE = 1e-5
"""How far embeddings of one image may lie apart, relative to their norm: float32 forward passes differ by about 1e-6."""

_IMAGES, _CANDIDATES = 6, 48


@torch.no_grad()
def largest_difference(embed: Callable[[Tensor], Tensor], model: MergedModel) -> float:
    """How far embeddings lie from the model's at most, relative to their norm, for a batch of one image and one of five.

    Args:
        embed: gives the embeddings ``[N, embed_dim]`` of images ``[N, 3, H, W]``, on the CPU.
        model: what they are compared with.
    """
    images = sample_images(model)
    found = torch.cat([embed(images[:1]), embed(images[1:])])
    return float(relative(found, _embeddings(model, images)).max())


def relative(found: Tensor, expected: Tensor) -> Tensor:
    """Distance of each row from the expected one, in norms of that: ``[N]``, float64; infinite where a value is not finite."""
    norm = torch.linalg.vector_norm
    ratio: Tensor = norm(found.double() - expected.double(), dim=-1) / norm(expected.double(), dim=-1)
    return ratio.nan_to_num(nan=torch.inf)


@torch.no_grad()
def sample_images(model: MergedModel) -> Tensor:
    """Six seeded random images ``[6, 3, H, W]`` whose embeddings float32 determines to the tolerance.

    A router may score two experts alike. Then rounding decides, and no two programs need to agree. Such an image gives itself
    away: changes in the last digits of what the routed layers get change its embedding by much more.

    Raises:
        InputError: when nearly all images are like that.
    """
    generator = torch.Generator().manual_seed(0)
    kept: list[Tensor] = []
    for _ in range(_CANDIDATES // _IMAGES):
        images = torch.randn(_IMAGES, 3, *model.image_size, generator=generator)
        expected = _embeddings(model, images)
        with _last_digits_changed(model, generator):
            moved = [relative(_embeddings(model, images), expected) for _ in range(3 if model.routed else 0)]
        kept += [image for image, *moves in zip(images, *moved, strict=True) if max(moves, default=0) < TOLERANCE]
        if len(kept) >= _IMAGES:
            return torch.stack(kept[:_IMAGES])
    raise InputError(
        f"{model.directory}: rounding decides which experts nearly all images are routed to, so no export can be checked; "
        "merge again with fewer features for the routers, or export the base alone"
    )


@contextmanager
def _last_digits_changed(model: MergedModel, generator: torch.Generator) -> Iterator[None]:
    """Add noise of about ten roundings to the inputs of the routed layers, while the context is open."""

    def change(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = inputs
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        return (x + 1e-6 * x.square().mean(-1, keepdim=True).sqrt() * noise,)

    layers = [module for module in model.encoder.modules() if isinstance(module, RoutedLinear)]
    handles = [layer.register_forward_pre_hook(change) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _embeddings(model: MergedModel, images: Tensor) -> Tensor:
    embeddings: Tensor = model.encoder(images.to(model.device))
    return embeddings.cpu()
