"""Tokens on their way through a model, block by block, each block run once."""

from collections.abc import Callable

from torch import Tensor


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
