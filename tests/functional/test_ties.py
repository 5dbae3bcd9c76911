import gc

import pytest
import torch

from mergekit_vision.functional.ties import magnitude_threshold, ties_merge


def numbers(n: int, seed: int = 0, decades: float = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator) * 10 ** (-decades * torch.rand(n, generator=generator))


@pytest.mark.parametrize("density", [0.001, 0.05, 0.2, 0.5, 0.999])
def test_threshold_is_the_order_statistic_bit_for_bit(density):
    values = numbers(10_007)
    m = 10_007 - int(10_007 * density)
    expected = values.abs().sort().values[m - 1].item()
    pieces = [values[:13].view(13, 1), values[13:5000].view(-1), values[5000:]]
    assert magnitude_threshold(lambda: pieces, density) == expected
    assert int((values.abs() >= expected).sum()) == int(10_007 * density) + 1


def test_threshold_among_equal_and_denormal_magnitudes():
    values = torch.tensor([0.0, -0.0, 1e-42, -2e-42, 3e-42, 1.0, -1.0, 1.0, 1.0, 2.0])
    for m in range(1, 10):
        assert magnitude_threshold(lambda: [values], 1 - m / 10 + 1e-9) == values.abs().sort().values[m - 1].item()


def test_full_density_keeps_everything():
    assert magnitude_threshold(lambda: [numbers(10)], 1.0) == 0.0


def test_frozen_entries_take_a_share_of_the_quota():
    values = numbers(1000)
    frozen = torch.cat([values, torch.zeros(300)])
    assert magnitude_threshold(lambda: [values], 0.2, count_frozen=300) == magnitude_threshold(lambda: [frozen], 0.2)
    assert magnitude_threshold(lambda: [values], 0.2, count_frozen=5000) == 0.0


def test_mean_sum_and_max_of_the_agreeing_entries():
    deltas = torch.tensor([[[1.0, -4.0]], [[2.0, 5.0]], [[-2.5, 2.0]]])
    thresholds = torch.zeros(3)
    assert ties_merge(deltas, thresholds, "mean").merged.tolist() == [[1.5, 3.5]]
    assert ties_merge(deltas, thresholds, "sum").merged.tolist() == [[3.0, 7.0]]
    assert ties_merge(deltas, thresholds, "max").merged.tolist() == [[2.0, 5.0]]
    assert ties_merge(-deltas, thresholds, "max").merged.tolist() == [[-2.0, -5.0]]


def test_cancellations_take_the_given_sign_and_are_reported():
    deltas = torch.tensor([[1.0, 3.0, 0.0], [-1.0, 1.0, 0.0]])
    thresholds = torch.zeros(2)
    assert [ties_merge(deltas, thresholds, tie_sign=sign).merged[0].item() for sign in (1, -1, 0)] == [1.0, -1.0, 0.0]
    result = ties_merge(deltas, thresholds)
    assert (result.votes, result.cancelled) == (1, True)
    assert not ties_merge(deltas[:, 1:], thresholds).cancelled


def test_the_counts_of_a_threshold_are_added_up_as_they_come():
    """One count of 16-bit numbers takes half a megabyte; a ViT has hundreds of tensors."""
    values, alive = numbers(10_007), []

    def pieces():
        for piece in values.split(1000):
            alive.append(sum(torch.is_tensor(item) and item.shape == (1 << 16,) for item in gc.get_objects()))
            yield piece

    assert magnitude_threshold(pieces, 0.2) == magnitude_threshold(lambda: [values], 0.2)
    assert len(alive) == 22
    assert max(alive) - min(alive) <= 3
