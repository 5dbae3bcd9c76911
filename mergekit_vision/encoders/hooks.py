"""Capture of what layers see during a forward pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn


@contextmanager
def capture_inputs(model: nn.Module, observers: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Hand the input of each named submodule to its observer while the context is open.

    The hooks are removed whatever happens inside. Nothing is stored: an observer accumulates what it wants over the batches.

    Args:
        model: whose submodules are watched.
        observers: submodule name (as in ``model.get_submodule``) -> function of that module's input, ``[images, tokens, d_in]``,
            detached and in float32; ``x.flatten(0, -2)`` gives its rows.

    Raises:
        AttributeError: for a name that ``model`` does not have; no hook is left behind.

    >>> import torch
    >>> net, seen = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), []
    >>> with capture_inputs(net, {"1": lambda x: seen.append(x.shape)}):
    ...     _ = net(torch.zeros(4, 3))
    >>> seen
    [torch.Size([4, 5])]
    """
    with ExitStack() as stack:
        for name, observer in observers.items():
            handle = model.get_submodule(name).register_forward_pre_hook(_hook(observer))
            stack.callback(handle.remove)
        yield


@contextmanager
def capture_outputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Input and output of named submodules in the latest forward pass, part of its graph, while the context is open.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    >>> with capture_outputs(net, ["1"]) as seen:
    ...     loss = net(torch.ones(4, 3)).sum()
    >>> torch.autograd.grad(loss, seen["1"][1])[0].shape
    torch.Size([4, 2])
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = args[0], output

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(partial(keep, name)).remove)
        yield seen


def _hook(observer: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hand_over(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        observer(args[0].detach().float())

    return hand_over
