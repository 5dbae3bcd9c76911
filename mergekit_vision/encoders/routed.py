"""Linear layers with routed low-rank experts, and the routing that they share."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_vision.errors import InputError
from mergekit_vision.routers import Choice, LowRankExperts

Route = Literal["router", "oracle", "base"]


class Routing:
    """How the routed layers of one encoder choose their experts, and what they chose. One forward pass at a time.

    Attributes:
        mode: ``"router"``; ``"oracle"``, where each image takes the expert of its true task; ``"base"``, without experts.
        truth: index of the true task of each image of the next batch, ``[N]``; the oracle needs it, and images without it are
            not counted.
        counts: layer name -> ``[T, T]``, float64 where the device has it: how many images of each true task (row) took each
            expert (column). Where tokens are routed an image counts as the mean over its tokens. Empty unless :meth:`record`
            was called.
    """

    def __init__(self) -> None:
        self.mode: Route = "router"
        self.truth: Tensor | None = None
        self.counts: dict[str, Tensor] = {}
        self.layers: dict[str, RoutedLinear] = {}
        self._shared: Tensor | None = None
        self._ahead = False

    def look_ahead(self, run: Callable[[], object]) -> None:
        """Add up the scores of the layers that decide ahead, while ``run`` runs the encoder that far: without experts."""
        self._shared, self._ahead = None, True
        run()
        self._ahead = False

    def forget(self) -> None:
        """Forget what was decided for all layers: it is of one forward pass, and the next batch may be as large."""
        self._shared, self._ahead = None, False

    def record(self, on: bool = True) -> None:
        """Start counting choices from zero, or stop and forget."""
        self.counts = {}
        for name, layer in self.layers.items() if on else ():
            experts, device = len(layer.down), layer.down.device
            dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's devices have no float64
            self.counts[name] = torch.zeros(experts, experts, dtype=dtype, device=device)

    def choose(self, layer: "RoutedLinear", x: Tensor) -> Choice | None:
        """The experts of ``layer`` for its input ``x [N, L, d_in]``; ``None`` without experts."""
        if self.mode == "base":
            return None
        if self.mode == "oracle":
            index = self._true_tasks(x).view(-1, 1, 1)
            choice = Choice(index, torch.ones_like(index, dtype=layer.weight.dtype))
        else:
            if self._ahead:
                return self._score_ahead(layer, x)
            with torch.autocast(x.device.type, enabled=False):  # a choice must not hinge on bfloat16's three digits
                choice = layer.router.choose(self._evidence(layer, x.to(layer.weight.dtype)))
        if self.counts and self.truth is not None:
            counts = self.counts[layer.name]
            counts.index_add_(0, self._true_tasks(x), choice.dense(len(layer.down)).mean(1).to(counts.dtype))
        return choice

    def _score_ahead(self, layer: "RoutedLinear", x: Tensor) -> Choice | None:
        """Add up the scores of ``layer``, of an image the mean over its tokens; no experts yet."""
        if layer.evidence == "ahead":
            with torch.autocast(x.device.type, enabled=False):
                scores: Tensor = layer.router(x.to(layer.weight.dtype)).mean(1, keepdim=True)
                self._shared = scores if self._shared is None else self._shared + scores
        return None

    def _evidence(self, layer: "RoutedLinear", x: Tensor) -> Tensor:
        if layer.evidence == "own":
            scores: Tensor = layer.router(x)
            return scores
        if layer.evidence == "start":
            self._shared = layer.router(x)
        elif self._shared is None or self._shared.shape[0] != x.shape[0]:  # `len` would fix the size in an exported graph
            raise RuntimeError(f"{layer.name}: no earlier layer started the shared evidence for this batch")
        elif layer.evidence == "add":
            self._shared = self._shared + layer.router(x)
        assert self._shared is not None
        return self._shared

    def _true_tasks(self, x: Tensor) -> Tensor:
        if self.truth is None or len(self.truth) != len(x):
            got = "none" if self.truth is None else f"{len(self.truth)}"
            raise InputError(
                f"oracle routing needs the true task, one of those merged, of each of the {len(x)} images in `truth`; got {got}"
            )
        return self.truth.to(x.device)


class RoutedLinear(nn.Module):
    """A Linear layer with low-rank experts, chosen anew for each image or token.

    No dense delta is formed: an image's (or token's) factors are gathered, or the tokens grouped, and each costs
    ``r (d_in + d_out)`` multiplications a token. ``weight`` and ``bias`` are the wrapped layer's own, under their own names.

    Factors of fewer bytes a number than the layer's weight are kept as they are, and those that are used are cast to the output's
    dtype (on an accelerator and in graphs all, where all are multiplied). Router and shifts get the layer's dtype.

    Args:
        linear: the layer.
        experts: what is added to its output.
        routing: shared by all routed layers of an encoder.
        name: of the layer, in the counts and messages.
    """

    up: Tensor
    down: Tensor
    shift: Tensor | None

    def __init__(self, linear: nn.Linear, experts: LowRankExperts, routing: Routing, name: str) -> None:
        super().__init__()
        if (linear.out_features, linear.in_features) != (experts.up.shape[1], experts.down.shape[2]):
            raise InputError(
                f"{name}: the layer is {linear.out_features} x {linear.in_features}, "
                f"its experts are {experts.up.shape[1]} x {experts.down.shape[2]}"
            )
        device, dtype = linear.weight.device, linear.weight.dtype
        self.name, self.routing, self.evidence = name, routing, experts.evidence
        self.weight, self.bias = linear.weight, linear.bias
        self.router = deepcopy(experts.router).to(device, dtype)
        up, down = (part.to(device, _narrower(part.dtype, dtype)) for part in (experts.up, experts.down))
        self.register_buffer("up", up.transpose(1, 2).contiguous())  # [T, r, d_out]: rows to gather
        self.register_buffer("down", down.contiguous())
        self.register_buffer("shift", None if experts.bias is None else experts.bias.to(device, dtype))

    @property
    def experts(self) -> LowRankExperts:
        """The experts as data."""
        return LowRankExperts(self.up.transpose(1, 2).contiguous(), self.down, self.router, self.shift, self.evidence)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, L, d_in]`` to ``[N, L, d_out]``; an image's output depends on that image only."""
        choice = self.routing.choose(self, x)
        if choice is None:
            return F.linear(x, self.weight, self.bias)
        eager = x.device.type == "cpu" and not torch.compiler.is_compiling()  # the host may look at the choice
        by_image = choice.experts.shape[1] == 1 and choice.experts.shape[2] < len(self.down)
        if eager and not by_image:
            return self._grouped(x, choice)
        y = F.linear(x, self.weight, self.bias)
        if by_image:
            y = self._one_by_one(y, x, choice) if eager else self._gathered(y, x, choice)
        else:
            y = self._masked(y, x, choice)
        return y if self.shift is None else y + choice.dense(len(self.down)).to(y.dtype) @ self.shift.to(y.dtype)

    def _one_by_one(self, y: Tensor, x: Tensor, choice: Choice) -> Tensor:
        """Each image multiplies with its own experts' factors where they lie. Not for a graph or an accelerator."""
        rows = x.to(y.dtype)
        pairs = list(zip(choice.experts[:, 0].tolist(), choice.weight[:, 0].tolist(), strict=True))
        used = {expert for chosen, weight in pairs for expert, share in zip(chosen, weight, strict=True) if share}
        up = {expert: self.up[expert].to(y.dtype) for expert in used}
        down = {expert: self.down[expert].to(y.dtype).T for expert in used}
        for image, (chosen, weight) in enumerate(pairs):
            for expert, share in zip(chosen, weight, strict=True):
                if share:  # an image whose task is beyond doubt costs one expert, not top_k
                    y[image].addmm_(rows[image] @ down[expert], up[expert], alpha=share)
        return y

    def _gathered(self, y: Tensor, x: Tensor, choice: Choice) -> Tensor:
        """Each image multiplies with a copy of its own experts' factors."""
        index = choice.experts[:, 0]
        up, down = _gather(self.up, index, y.dtype), _gather(self.down, index, y.dtype)  # [N, K, r, d_out], [N, K, r, d_in]
        codes = torch.bmm(x.to(y.dtype), down.flatten(1, 2).transpose(1, 2)).view(*x.shape[:2], *down.shape[1:3])
        if index.shape[1] > 1:
            codes = codes * choice.weight.to(y.dtype).unsqueeze(-1)
        return y.baddbmm_(codes.flatten(2), up.flatten(1, 2))

    def _grouped(self, x: Tensor, choice: Choice) -> Tensor:
        """Each expert runs once, with its bias, on the tokens that chose it: how many is not for a graph or accelerator."""
        experts, top_k = choice.experts.expand(-1, x.shape[1], -1).flatten(), choice.experts.shape[2]
        # a token's only expert brings the layer's bias along with its own: a pass over the output less
        before, bias = (None, _sum(self.bias, self.shift)) if top_k == 1 else (self.bias, self.shift)
        y = F.linear(x, self.weight, before)
        biases = None if bias is None else bias.to(y.dtype).expand(len(self.down), -1)
        if top_k > 1:  # what has no weight goes to a group behind the last expert's, which is left out
            weight = choice.weight.to(y.dtype).expand(-1, x.shape[1], -1).reshape(-1, 1)
            experts = experts.masked_fill(weight.flatten() == 0, len(self.down))
        counts: list[int] = torch.bincount(experts, minlength=len(self.down) + 1).tolist()
        groups = torch.split(experts.argsort(stable=True), counts)[:-1]  # of (token, position), by expert
        rows, out = x.to(y.dtype).flatten(0, 1), y.view(-1, y.shape[-1])
        for expert, (group, down, up) in enumerate(zip(groups, self.down, self.up, strict=True)):
            if not len(group):
                continue
            chosen, up = group if top_k == 1 else group // top_k, up.to(y.dtype)
            codes = rows.index_select(0, chosen) @ down.to(y.dtype).T
            added = codes @ up if biases is None else torch.addmm(biases[expert], codes, up)
            out.index_add_(0, chosen, added if top_k == 1 else added.mul_(weight[group]))
        return y

    def _masked(self, y: Tensor, x: Tensor, choice: Choice) -> Tensor:
        """All experts' codes, zeroed where not chosen: two large products instead of many small ones."""
        codes = F.linear(x.to(y.dtype), self.down.to(y.dtype).flatten(0, 1)).view(*x.shape[:-1], *self.down.shape[:2])
        codes = codes * choice.dense(len(self.down)).to(y.dtype).unsqueeze(-1)
        out: Tensor = y + codes.flatten(-2) @ self.up.to(y.dtype).flatten(0, 1)
        return out


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Of what there is."""
    return b if a is None else a if b is None else a + b


def _narrower(own: torch.dtype, layer: torch.dtype) -> torch.dtype:
    """The dtype of fewer bytes a number; the layer's where both have as many."""
    return own if own.itemsize < layer.itemsize else layer


def _gather(factors: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Copies of the factors of chosen experts, cast to ``dtype``: before they are gathered where that makes them smaller."""
    return factors.to(dtype)[index] if dtype.itemsize < factors.dtype.itemsize else factors[index].to(dtype)


def attach(encoder: nn.Module, routed: Mapping[str, LowRankExperts]) -> Routing:
    """Replace named Linear layers by routed ones, in place.

    Args:
        encoder: the model; ``encoder.get_submodule(name)`` finds each layer.
        routed: layer name -> experts, in forward order.

    Returns:
        What the new layers share: the routing mode, the true tasks and the counts.

    Raises:
        InputError: when a name is not a plain Linear layer of the encoder.
    """
    routing = Routing()
    for name, experts in routed.items():
        owner, _, child = name.rpartition(".")
        try:
            linear = encoder.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise InputError(f"experts for {name!r}, which is not a Linear layer of this encoder (was it linearized?)")
        routing.layers[name] = RoutedLinear(linear, experts, routing, name)
        setattr(encoder.get_submodule(owner), child, routing.layers[name])
    return routing
