"""Tokens on their way through a model, block by block, each block run once."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, split

STEP, STEP_ELSEWHERE = 1024, 8192
"""Tokens whose layer inputs are held at once, roughly, on a CPU and on an accelerator: as many as keep products at full speed."""


class Stream:
    """The tokens of some images where they enter a block; those of later blocks follow from them when asked for.

    Args:
        embed: gives the tokens that enter block 0.
        run: gives the tokens that leave a block, of its index and those that enter it.

    >>> import torch
    >>> stream = Stream(lambda: torch.zeros(1), lambda index, tokens: tokens + index + 1)
    >>> stream.entering(3), stream.entering(4)
    (tensor([6.]), tensor([10.]))
    """

    def __init__(self, embed: Callable[[], Tensor], run: Callable[[int, Tensor], Tensor]) -> None:
        self._embed, self._run = embed, run
        self._tokens: Tensor | None = None
        self._block = 0

    def entering(self, block: int) -> Tensor:
        """The tokens that enter a block, not before the last one that was asked for."""
        tokens = self._embed() if self._tokens is None else self._tokens
        for index in range(self._block, block):
            tokens = self._run(index, tokens)
        self._tokens, self._block = tokens, block
        return tokens

    def left(self, block: int, tokens: Tensor) -> None:
        """Take over the tokens that left a block, when something else has run it."""
        self._tokens, self._block = tokens, block + 1


class Updated(Mapping[str, Tensor]):
    """Weights with an update, each added up when it is asked for: as the update grows, so do the weights.

    Args:
        base: key -> tensor.
        update: key -> what is added to it, on the device where the sum is wanted.

    >>> import torch
    >>> update = {}
    >>> weights = Updated({"a": torch.ones(1), "b": torch.ones(1)}, update)
    >>> update["b"] = torch.ones(1)
    >>> weights["a"], weights["b"]
    (tensor([1.]), tensor([2.]))
    """

    def __init__(self, base: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> None:
        self._base, self._update = base, update

    def __getitem__(self, key: str) -> Tensor:
        value, change = self._base[key], self._update.get(key)
        return value if change is None else value.to(change.device) + change

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


class Remembered(dict[str, Tensor]):
    """Weights, each of which is made once, when it is first asked for by its key, and held.

    Args:
        weights: gives them.

    >>> import torch
    >>> weights = Remembered(Updated({"a": torch.ones(1)}, {"a": torch.ones(1)}))
    >>> weights["a"] is weights["a"]
    True
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._weights = weights

    def __missing__(self, key: str) -> Tensor:
        value = self[key] = self._weights[key]
        return value


def in_steps(*streams: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tokens ``[images, tokens, d]`` of the same images in several models, a few images at a time: as many as make a step.

    >>> import torch
    >>> [[len(part) for part in parts] for parts in in_steps(torch.zeros(3, 512, 1), torch.zeros(3, 512, 8))]
    [[2, 2], [1, 1]]
    """
    first = streams[0]
    images = max(1, round((STEP if first.device.type == "cpu" else STEP_ELSEWHERE) / first.shape[1]))
    return zip(*(split(stream, images) for stream in streams), strict=True)
