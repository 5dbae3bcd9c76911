"""Routers: what they choose, and that they can be made again from what is saved of them."""

import numpy as np
import pytest
import torch
from routed_encoder import KINDS, TASKS, WIDTH, make_router, normal
from tolerances import assert_near, summed
from torch import Tensor

from mergekit_vision.routers import Choice, CosineRouter, HeldRouter, LinearRouter, LowRankExperts, SubspaceRouter


def test_weights_of_all_experts_are_zero_where_not_chosen() -> None:
    choice = Choice(torch.tensor([[[2, 0]], [[1, 2]]]), torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]]]))
    assert choice.dense(4).tolist() == [[[0.25, 0, 0.75, 0]], [[0, 0.5, 0.5, 0]]]


def test_factors_are_rounded_to_the_nearest_of_eight_binary_digits() -> None:
    up, down = normal(TASKS, 6, 2) * torch.tensor([1e-30, 1e20]), normal(TASKS, 2, WIDTH, seed=1)
    experts = LowRankExperts(up, down, HeldRouter(TASKS), normal(TASKS, 6, seed=2), "hold")
    rounded = experts.rounded("bfloat16")
    for name in ("up", "down"):
        mantissa, exponent = np.frexp(getattr(experts, name).double().numpy())
        expected = np.ldexp(np.round(mantissa * 256) / 256, exponent)  # ties to even, as the processor's
        assert getattr(rounded, name).dtype == torch.bfloat16
        assert np.array_equal(getattr(rounded, name).double().numpy(), expected)
    assert (rounded.router, rounded.bias, rounded.evidence) == (experts.router, experts.bias, "hold")
    same = experts.rounded("float32")
    assert torch.equal(same.up, up)
    assert torch.equal(same.down, down)


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (1, 0.01), (2, 1.0), (2, 5.0), (9, 1.0)])
def test_the_best_are_mixed_by_the_softmax_of_their_scores(top_k: int, temperature: float) -> None:
    scores = torch.tensor([[[1.0, 3.0, 2.0]]])
    choice = CosineRouter(torch.eye(3), top_k=top_k, temperature=temperature).choose(scores)
    best = [1, 2, 0][:top_k]
    assert choice.experts.tolist() == [[best]]
    assert torch.equal(choice.weight[0, 0], (scores[0, 0, best] / temperature).softmax(-1))
    if top_k == 1:
        assert choice.weight.tolist() == [[[1.0]]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_router_is_made_again_from_its_buffers_and_arguments(kind: str) -> None:
    router, x = make_router(kind, WIDTH, seed=3), normal(4, 5, WIDTH)
    again = type(router)(**dict(router.named_buffers()), **router.arguments())
    assert again.arguments() == router.arguments()
    assert torch.equal(again(x), router(x))


@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_of_an_image_depend_on_that_image_only(kind: str) -> None:
    router, x = make_router(kind, WIDTH, seed=3), normal(4, 5, WIDTH)
    changed = x.clone()
    changed[1:] = 100.0
    assert torch.equal(router(changed)[0], router(x)[0])
    assert not torch.equal(router(changed)[1], router(x)[1])


@pytest.mark.parametrize("kind", ["subspace", "subspace of several features, mixed"])
def test_the_nearest_subspace_has_the_highest_score(kind: str) -> None:
    router, x = make_router(kind, WIDTH, seed=3), normal(6, 5, WIDTH)
    f = x[:, 0].double() if kind == "subspace" else torch.cat([x.double().mean(1), x.double().std(1, correction=0)], 1)
    centers = torch.zeros(TASKS, f.shape[1]) if router.center is None else router.center
    distances = []
    for V, center in zip(router.basis.double(), centers.double(), strict=True):
        distances.append(torch.linalg.vector_norm((torch.eye(f.shape[1]) - V.T @ V) @ (f - center).T, dim=0))
    distance = torch.stack(distances, 1)
    expected = -(distance - distance.mean(1, keepdim=True)) / distance.std(1, correction=0, keepdim=True)
    assert_near(router(x)[:, 0], expected, summed(WIDTH) * distance.norm() / (distance - distance.mean(1, keepdim=True)).norm())


def test_who_is_as_near_to_all_is_not_divided_by_zero() -> None:
    router = SubspaceRouter(torch.zeros(3, 2, WIDTH))
    assert router(normal(4, 5, WIDTH)).tolist() == [[[0.0, 0.0, 0.0]]] * 4


def test_a_held_router_mixes_by_the_scores_of_others() -> None:
    router = HeldRouter(3, top_k=2, temperature=0.5)
    again = HeldRouter(**router.arguments())
    assert again(normal(4, 5, WIDTH)).shape == (4, 1, 3)
    choice = again.choose(torch.tensor([[[1.0, 3.0, 2.0]]]))
    assert torch.equal(choice.weight[0, 0], torch.tensor([6.0, 4.0]).softmax(0))


def test_factors_have_to_fit_each_other() -> None:
    up, down, router = torch.zeros(2, 5, 3), torch.zeros(2, 3, 6), CosineRouter(torch.zeros(2, 6))
    LowRankExperts(up, down, router, torch.zeros(2, 5))
    for wrong in ((up[:1], down), (up, down[:, :2]), (up[0], down)):
        with pytest.raises(ValueError, match="do not fit each other"):
            LowRankExperts(*wrong, router)
    with pytest.raises(ValueError, match=r"bias must be \[T, d_out\] = \[2, 5\], got \[2, 6\]"):
        LowRankExperts(up, down, router, torch.zeros(2, 6))


def test_a_router_is_tried_as_a_layer_takes_it_over() -> None:
    up, down = torch.zeros(2, 5, 3), torch.zeros(2, 3, 6)
    mixed = LinearRouter(torch.zeros(2, 3).double(), torch.zeros(2), ("covariance",), torch.zeros(6, 2).float(), torch.zeros(2))
    LowRankExperts(up, down, mixed).check_router()
    assert mixed.weight.dtype == torch.float64, "of which a copy was taken"

    class Silent(CosineRouter):
        def forward(self, x: Tensor) -> Tensor:
            return None  # type: ignore[return-value]

    for router, message in (
        (CosineRouter(torch.zeros(3, 6)), r"scores \[1, 1, 3\] for the 2"),
        (Silent(torch.zeros(2, 6)), "run"),
    ):
        with pytest.raises(ValueError, match=message):
            LowRankExperts(up, down, router).check_router()


def ragged(*ranks: int) -> LowRankExperts:
    up, down = normal(len(ranks), 6, max(ranks)), normal(len(ranks), max(ranks), 8, seed=1)
    for t, k in enumerate(ranks):
        up[t, :, k:] = down[t, k:] = 0
    return LowRankExperts(up, down, HeldRouter(len(ranks)))


def test_zeros_at_the_end_of_an_expert_are_not_stored() -> None:
    experts = ragged(2, 5, 1)
    tensors, ranks = experts.stored()
    assert ranks == experts.ranks == [2, 5, 1]
    assert (tensors["up"].shape, tensors["down"].shape) == ((6, 8), (8, 8))
    up, down = LowRankExperts.padded(tensors["up"], tensors["down"], ranks)
    assert torch.equal(up, experts.up)
    assert torch.equal(down, experts.down)
    assert ragged(3, 3).stored()[1] is None
    assert LowRankExperts(torch.zeros(2, 6, 3), torch.zeros(2, 3, 8), HeldRouter(2)).ranks == [1, 1]


def test_a_zero_within_an_expert_is_stored() -> None:
    experts = ragged(3, 2)
    experts.up[0, :, 1] = experts.down[0, 2] = 0
    assert experts.ranks == [3, 2]


@pytest.mark.parametrize("ranks", [[], [8], [2, 5], [2, 6, 0], [2, 5, 2], [9, -1]])
def test_ranks_that_do_not_fit_the_factors_are_refused(ranks: list[int]) -> None:
    tensors, _ = ragged(2, 5, 1).stored()
    with pytest.raises(ValueError, match="do not fit the experts' ranks"):
        LowRankExperts.padded(tensors["up"], tensors["down"], ranks)
