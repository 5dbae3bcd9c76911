"""How exports are compared with the merged model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergekit_vision import InputError
from mergekit_vision.export.agreement import TOLERANCE, largest_difference, relative, sample_images
from mergekit_vision.export.directory import load_experts
from mergekit_vision.export.merged import MergedModel, open_merged


@pytest.fixture
def model(merged: Callable[[str], Path]) -> MergedModel:
    return open_merged(merged("ESMPP"), {}, load_experts(merged("ESMPP")))


def test_distances_are_relative_to_the_norm_of_each_image() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 100.0], [1.0, 0.0]])
    found = torch.tensor([[3.0, 4.5], [1.0, 100.0], [torch.nan, 0.0]])
    assert relative(found, expected).tolist() == pytest.approx([0.1, 0.01, torch.inf])


def test_the_worst_of_all_images_counts_in_batches_of_one_and_five(model: MergedModel) -> None:
    sizes = []

    def embed(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        found = model.encoder(images)
        found[-1] *= 1.01 if len(images) == 5 else 1.001
        return found

    assert largest_difference(embed, model) == pytest.approx(0.01, rel=1e-3)
    assert sizes == [1, 5]


def test_images_whose_experts_rounding_decides_are_left_out(model: MergedModel) -> None:
    usual = sample_images(model)
    assert model.encoder.routing is not None
    layer = next(iter(model.encoder.routing.layers.values()))
    first, decide = usual[0], layer.router.forward
    with torch.no_grad():
        tokens = model.encoder.visual.transformer.resblocks[0].ln_1(model.encoder.embed(usual))[:1]

    def tied(x: torch.Tensor) -> torch.Tensor:
        """The best two scores of the first image change places when its tokens change at all."""
        distance = (x - tokens).abs().flatten(1).amax(1)
        scores = decide(x)
        scores[distance < 1e-3, 0, 0] = 9.0
        scores[(distance < 1e-3) & (distance > 5e-7), 0, 1] = 9.1
        return scores

    layer.router.forward = tied  # type: ignore[method-assign]
    kept = sample_images(model)
    assert len(kept) == len(usual) == 6
    assert not any(torch.equal(image, first) for image in kept)
    assert torch.equal(kept[:5], usual[1:])


def test_a_model_of_which_nothing_can_be_compared_is_refused(model: MergedModel) -> None:
    assert model.encoder.routing is not None
    for layer in model.encoder.routing.layers.values():
        layer.router.forward = lambda x: x[:, :1, :3] * 1e7 % 1  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"rounding decides which experts nearly all images are routed to"):
        sample_images(model)


def test_random_images_of_a_static_model_are_seeded(merged: Callable[[str], Path]) -> None:
    static = open_merged(merged("ESM"), {}, {})
    expected = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_images(static), expected)
    assert largest_difference(static.encoder, static) < TOLERANCE
