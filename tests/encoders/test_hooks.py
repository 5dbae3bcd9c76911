import pytest
import torch
from tolerances import assert_near, forward
from torch import nn

from mergekit_vision.encoders.hooks import capture_inputs


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))


def test_observer_gets_the_layer_input_of_every_batch() -> None:
    model, x, seen = network(), torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(1)), []
    with capture_inputs(model, {"2": seen.append}):
        model(x[:5])
        model(x[5:])
    assert_near(torch.cat(seen), nn.functional.gelu(model[0](x)).detach(), forward(2, 3))
    assert not seen[0].requires_grad


def test_half_precision_inputs_arrive_in_float32() -> None:
    model, seen = network().bfloat16(), []
    with capture_inputs(model, {"0": seen.append}):
        model(torch.ones(1, 3, dtype=torch.bfloat16))
    assert seen[0].dtype == torch.float32


def test_nothing_is_observed_after_an_error_inside() -> None:
    model, seen = network(), list[torch.Tensor]()
    with pytest.raises(RuntimeError, match="shapes"), capture_inputs(model, {"0": seen.append}):
        model(torch.ones(1, 4))
    assert len(seen) == 1, "what was passed on before the error"
    model(torch.ones(1, 3))
    assert len(seen) == 1


def test_an_unknown_layer_leaves_no_hook_behind() -> None:
    model, seen = network(), list[torch.Tensor]()
    with pytest.raises(AttributeError), capture_inputs(model, {"0": seen.append, "nowhere": seen.append}):
        pass
    model(torch.ones(1, 3))
    assert seen == []
