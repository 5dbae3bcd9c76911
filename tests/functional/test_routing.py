"""Statistics of routers against their definitions, written plainly in float64."""

import pytest
import torch
from tolerances import assert_near, direct, subspace, summed
from torch import Tensor

from mergekit_vision.functional import routing
from mergekit_vision.functional.routing import calibrate, discriminant, pool_tokens, principal_axes, subspaces


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups(sizes: list[int], features: int) -> list[Tensor]:
    mixing = normal(features, features, seed=99)
    return [normal(n, features, seed=t) @ mixing + 2 * normal(features, seed=50 + t) for t, n in enumerate(sizes)]


@pytest.mark.parametrize("shrinkage", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("sizes", [[9, 5, 2], [30, 30, 30, 30], [4, 1, 6]])
def test_left_out_images_are_judged_by_the_others(sizes: list[int], shrinkage: float) -> None:
    data = groups(sizes, 12)
    T, fit = len(sizes), discriminant(data, shrinkage)
    freedom = sum(sizes) - T
    spread = torch.cat([x - x.mean(0) for x in data]).square().sum(0) / freedom
    expected, labels, condition = [], [], 1.0
    for t, x in enumerate(data):
        for i in range(len(x) if len(x) > 1 else 0):
            others = [torch.cat([x[:i], x[i + 1 :]]) if s == t else y for s, y in enumerate(data)]
            means = torch.stack([y.mean(0) for y in others])
            rest = torch.cat([y - mean for y, mean in zip(others, means, strict=True)])
            A = (1 - shrinkage) * rest.T @ rest / freedom + shrinkage * spread.diag()
            condition = max(condition, float(torch.linalg.cond(A)))
            away = x[i] - means
            expected.append(-0.5 * (away @ torch.linalg.inv(A) * away).sum(1))
            labels.append(t)
    solutions = 4  # the covariance's and each image's downdate here, an inverse and its form in the reference
    assert_near(fit.left_out, torch.stack(expected), solutions * direct(12, condition, torch.float64))
    assert fit.labels.tolist() == labels


@pytest.mark.parametrize("shrinkage", [0.05, 0.7, 1.0])
@pytest.mark.parametrize("sizes", [[9, 5, 2], [40, 40, 40, 40], [4, 1, 6]])
def test_the_discriminant_is_that_of_the_shrunk_covariance(sizes: list[int], shrinkage: float) -> None:
    """With more images than features, and with fewer."""
    data = groups(sizes, 12)
    means = torch.stack([x.mean(0) for x in data])
    S = sum((x - mean).T @ (x - mean) for x, mean in zip(data, means, strict=True)) / (sum(sizes) - len(sizes))
    A = (1 - shrinkage) * S + shrinkage * S.diag().diag()
    x, fit = torch.cat(data), discriminant(data, shrinkage)
    away = x[:, None] - means
    expected = -0.5 * torch.einsum("ntf,fg,ntg->nt", away, torch.linalg.inv(A), away)
    bound = 2 * direct(12, float(torch.linalg.cond(A)), torch.float64)
    assert_near((x @ fit.weight.T + fit.bias).log_softmax(1), expected.log_softmax(1), bound)


@pytest.mark.parametrize("images", [7, 24, 90])
@pytest.mark.parametrize("shrinkage", [0.05, 1.0])
def test_both_ways_to_a_discriminant_are_one(images: int, shrinkage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    data, found = groups([images] * 2, 24), []
    for way in (routing._by_features, routing._by_images):
        monkeypatch.setattr(routing, "_by_features", way)
        monkeypatch.setattr(routing, "_by_images", way)
        found.append(discriminant(data, shrinkage))
    deviation = torch.cat([x - x.mean(0) for x in data]).square().sum(0).div(2 * images - 2).sqrt()
    C = torch.cat([x - x.mean(0) for x in data]) / deviation
    A = shrinkage * torch.eye(24, dtype=C.dtype) + (1 - shrinkage) / (2 * images - 2) * C.T @ C
    bound = 4 * direct(max(24, 2 * images), float(torch.linalg.cond(A)), torch.float64)
    for part, other in zip(*found, strict=True):
        assert_near(part, other, bound / shrinkage)  # leaving an image out divides by what is left of 1, at least about so much


def test_left_out_images_are_judged_less_kindly() -> None:
    data = groups([6, 6, 6], 40)
    fit = discriminant(data, 0.5)
    kind = torch.nn.functional.cross_entropy(torch.cat(data) @ fit.weight.T + fit.bias, fit.labels)
    assert torch.nn.functional.cross_entropy(fit.left_out, fit.labels) > 2 * kind


@pytest.mark.parametrize("copies", [1, 3])
def test_where_no_task_varies_features_count_as_they_vary_between_tasks(copies: int) -> None:
    images = torch.cat(groups([1, 1, 1], 12))
    fit = discriminant([image.expand(copies, -1) for image in images], 0.5)
    distances = ((images[:, None] - images) ** 2 / images.var(0)).sum(-1)
    scores = images @ fit.weight.T + fit.bias
    assert_near(scores.log_softmax(1), (-0.5 * distances / 0.5).log_softmax(1), direct(12, 12.0, torch.float64))
    assert 1 <= calibrate(fit.left_out, fit.labels) < 1e4
    assert not discriminant([images[:1]] * 2, 0.5).weight.any(), "the same image in all tasks"


@pytest.mark.parametrize("true", [1.0, 7.0, 300.0])
def test_calibrate_finds_the_most_likely_temperature(true: float) -> None:
    logits = 2 * normal(4000, 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        labels = torch.distributions.Categorical(logits=logits).sample()
    scores = logits * true
    found = calibrate(scores, labels)
    assert found == pytest.approx(true, rel=0.15), "as far as 4000 labels tell"
    loss = [torch.nn.functional.cross_entropy(scores / t, labels) for t in (found, 1.02 * found, max(1.0, found / 1.02))]
    assert loss[0] <= min(loss[1:]) * (1 + summed(len(labels), torch.float64))


def test_calibrate_does_not_sharpen_and_ends() -> None:
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert calibrate(sure, torch.tensor([0, 1])) == 1.0
    assert calibrate(sure, torch.tensor([1, 0])) == pytest.approx(1e4)
    assert calibrate(sure[:0], torch.zeros(0, dtype=torch.int64)) == 1.0


def test_tokens_have_unit_covariance_along_their_axes() -> None:
    x = normal(500, 10) @ normal(10, 10, seed=1) + 5
    axes = principal_axes(x.mean(0), x.T @ x / len(x), k=4)
    z = x @ axes.basis - axes.offset
    _, S, Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    variance, moment = S.square() / len(x), float((x.T @ x / len(x)).norm())  # the covariance is a difference of moments
    amplified = moment / float(variance[3])
    torch.testing.assert_close(z.mean(0), torch.zeros(4, dtype=x.dtype), atol=direct(10, amplified, x.dtype), rtol=0)
    assert_near(z.T @ z / len(z), torch.eye(4, dtype=x.dtype), direct(10, amplified, x.dtype))
    span, leading = torch.linalg.qr(axes.basis)[0], Vh[:4]
    assert (span @ span.T - leading.T @ leading).norm() < 2 * subspace(10, moment, float(variance[3] - variance[4]))


@pytest.mark.parametrize(("sizes", "k", "expected"), [([40, 9], 500, 24), ([9, 4], 500, 8), ([9, 4], 3, 3), ([1, 1], 8, 1)])
def test_subspaces_hold_no_more_directions_than_a_task_has(sizes: list[int], k: int, expected: int) -> None:
    data = groups(sizes, 24)
    basis, center = subspaces(data, k)
    assert basis.shape == (len(sizes), expected, 24)
    for x, mean, rows in zip(data, center, basis, strict=True):
        assert torch.equal(mean, x.mean(0))
        own = min(k, len(x) - 1, 24)
        assert not rows[own:].any()
        _, S, Vh = torch.linalg.svd(x - mean, full_matrices=False)
        gap = float(S[own - 1] ** 2 - (S[own] ** 2 if own < min(len(x) - 1, 24) else 0)) if own else 1.0
        leading = Vh[:own]
        assert (rows.T @ rows - leading.T @ leading).norm() <= 2 * subspace(24, float(S[0] ** 2), gap)


def test_pooled_tokens() -> None:
    x = normal(3, 7, 6) + 1
    rows = x.flatten(0, 1)
    axes = principal_axes(rows.mean(0), rows.T @ rows / len(rows), k=3)
    found = pool_tokens(x, ("covariance", "mean", "first", "deviation"), axes)
    for image, features in zip(x, found, strict=True):
        z = [axes.basis.T @ token - axes.offset for token in image]
        largest = float((image @ axes.basis).abs().max() + axes.offset.abs().max())
        moments = [sum(float(v[i] * v[j]) for v in z) / 7 for i in range(3) for j in range(i, 3)]
        expected = [m / (abs(m) + 0.01) ** 0.5 for m in moments]
        expected += [*image.mean(0).tolist(), *image[0].tolist(), *image.std(0, correction=0).tolist()]
        # a moment's signed root rises by at most 10 times the moment
        assert features.tolist() == pytest.approx(expected, abs=10 * largest**2 * summed(13, torch.float64))


def test_axes_along_which_tokens_do_not_vary_are_none() -> None:
    """Layer normalization takes one away; along it, coordinates would be rounding errors made as large as all others."""
    x = normal(200, 6) - normal(200, 6).mean(1, keepdim=True)
    x = x - x.mean(1, keepdim=True)
    axes = principal_axes(x.mean(0), x.T @ x / len(x), 6)
    assert axes.basis.shape == (6, 5)
    assert_near(
        (x @ axes.basis - axes.offset).square().mean(0), torch.ones(5, dtype=torch.float64), direct(200, 1e2, torch.float64)
    )
    constant = principal_axes(x[0], torch.outer(x[0], x[0]), 6)
    assert constant.basis.shape[1] <= 6
    assert constant.basis.isfinite().all()
