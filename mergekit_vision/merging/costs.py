"""What merging methods compute, counted from the sizes of the encoder alone: no weight is read.

Counted is what dominates: traffic of task vectors, products, decompositions of matrices, forward passes. A machine's speed at
each, measured by :mod:`mergekit_vision.merging.speed`, turns a count into seconds. How methods work is in :data:`METHODS`, with
their default parameters; of a method that is not listed there nothing is known. After a change of a kernel,
``python -m benchmarks.planning`` shows whether the counts still hold.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mergekit_vision.merger import Merger
from mergekit_vision.merging.work import Matrix, Sizes, Work, eigh, gram, polar, polar_product, product, svd, times, total

_LOADED = 28
"""Bytes moved for each number of a task vector: it is read and checked, and what the backbone has is subtracted."""
_SCATTERED = 1.5
"""Time of layer inputs' products, which are small and for each block of one task, relative to one large product."""
_CALLS = 52
"""Calls of torch for each tensor of an expert."""

_WIDTH = 768
"""Of the encoder for which :attr:`Method.routing` holds."""


def _leading(x: Matrix, k: int) -> Work:
    """The leading singular triplets of each task vector."""
    return times(svd(x.rows, x.columns, k), x.tasks)


def _tsvm(x: Matrix) -> Work:
    k = x.side // x.tasks
    return _leading(x, k) + polar_product(x.rows, k * x.tasks, x.columns, single=False)


def _essential(x: Matrix) -> Work:
    """Steps 1 to 6 of ESM: the essential subspace of each task, and their merge."""
    k = x.rows // x.tasks
    merged = times(product(k, x.rows, x.columns, "float32"), 2) + Work({"calls": 30})
    return times(_shift(x, k) + merged, x.tasks) + polar_product(x.rows, min(k, x.side) * x.tasks, x.columns, single=True)


def _shift(x: Matrix, k: int) -> Work:
    """The essential subspace of one task vector, from the layer's inputs."""
    if x.rows <= x.columns:
        seen = product(x.inputs, x.columns, x.rows, "float32") + gram(x.inputs, x.rows)
        return seen + eigh(x.rows) + Work({"calls": 150})
    root = Work({"float64": x.columns**3 // 3}) + product(x.rows, x.columns, x.columns, "float32")
    through = gram(x.rows, x.columns) + eigh(x.columns) + product(x.columns, x.columns, min(k, x.columns))
    return gram(x.inputs, x.columns) + root + through + Work({"calls": 200})


def _iso_c(x: Matrix) -> Work:
    """The last products in float32, as condition numbers mostly allow."""
    return polar(x.rows, x.columns, x.length, "float32")


def _iso_cts(x: Matrix) -> Work:
    common = round(0.8 * x.side)
    own = x.side - common
    first = svd(x.rows, x.columns, common)
    if x.rows <= x.columns:  # what the common directions leave, in coordinates of its own
        part = product(own, x.rows, x.columns) + svd(own, x.columns, own // x.tasks)
    else:
        part = times(product(x.rows, common, x.columns), 2) + svd(x.rows, x.columns, own // x.tasks)
    return first + times(part, x.tasks) + polar_product(x.rows, x.side, x.columns, single=False)


def _cart(x: Matrix) -> Work:
    k = max(1, int(0.08 * x.side))
    return _leading(x, k) + product(x.rows, k * x.tasks, x.columns)


def _dc(x: Matrix) -> Work:
    k = x.side // x.tasks
    coordinates = product(x.side, x.rows, k) + product(k, x.columns, x.side) + product(x.side, k, x.side)
    each = svd(x.rows, x.columns, k) + coordinates + Work({"ranked": x.side**2, "calls": 20})
    both = polar(x.rows, x.side, x.rows) + polar(x.side, x.columns, x.columns)
    back = product(x.rows, x.side, x.side) + product(x.rows, x.side, x.columns)
    return times(each, x.tasks) + both + back


def _opcm(x: Matrix) -> Work:
    turned = product(x.side, x.rows, x.columns) + product(x.rows, x.side, x.side) + product(x.rows, x.side, x.columns)
    closed = times(product(x.side, x.columns, x.side), 0.3)
    return times(svd(x.rows, x.columns, x.side) + turned + closed + Work({"calls": 15}), x.tasks - 1)


def _swudi(x: Matrix) -> Work:
    each = gram(x.rows, x.columns) + product(x.rows, x.columns, x.columns) + Work({"calls": 8, "bytes": 24 * x.columns**2})
    return times(each, x.tasks) + eigh(x.columns) + times(product(x.rows, x.columns, x.columns), 3)


def _truncated(x: Matrix, share: float) -> Work:
    k = max(1, round(share * x.side))
    return times(svd(x.rows, x.columns, x.side) + product(x.rows, k, x.columns), x.tasks)


def _reshaped(x: Matrix) -> Work:
    return svd(x.rows, x.columns, x.side) + product(x.rows, x.side, x.columns)


def _calibrated(x: Matrix) -> Work:
    rows = times(product(x.side, x.rows, x.columns) + Work({"calls": 12, "bytes": 24 * x.side * x.columns}), x.tasks)
    return _reshaped(x) + rows


def _regression(x: Matrix) -> Work:
    moments = Work({"bytes": 12 * x.inputs * x.columns + 40 * x.columns**2, "calls": 100})
    each = gram(x.inputs, x.columns) + product(x.columns, x.columns, x.rows) + moments
    return times(each, _SCATTERED * x.tasks) + _solved(x.columns, x.rows)


def _solved(side: int, columns: int) -> Work:
    """A positive definite system with so many right-hand sides, by Cholesky."""
    return Work({"float64": side**3 // 3 + 2 * side**2 * columns, "bytes": 40 * side**2, "calls": 10})


def _calibration(x: Matrix) -> Work:
    """FeatCal's fit of one layer."""
    moments = Work({"bytes": 40 * x.inputs * x.columns + 60 * x.columns**2, "calls": 300})
    if x.rows < x.columns:
        cross = product(x.inputs, x.columns, x.rows) + product(x.columns, x.inputs, x.rows)
    else:
        cross = product(x.columns, x.inputs, x.columns) + product(x.columns, x.columns, x.rows)
    each = gram(x.inputs, x.columns) + cross + product(x.columns, x.columns, x.rows) + moments
    return times(each, _SCATTERED * x.tasks) + _solved(x.columns, x.rows)


def _fisher(x: Matrix) -> Work:
    """FisherFit's fit of one layer: second moments, and some 35 preconditioned steps of conjugate gradients."""
    moments = (
        gram(x.inputs, x.columns) + gram(x.inputs, x.rows) + Work({"bytes": 24 * x.inputs * (x.rows + x.columns), "calls": 40})
    )
    pair = product(x.rows, x.rows, x.columns) + product(x.rows, x.columns, x.columns)
    return times(moments, x.tasks) + times(pair, 35 * (x.tasks + 2)) + eigh(x.rows) + eigh(x.columns)


def _routed(x: Matrix) -> Work:
    """The low-rank experts of ESM++ in one layer."""
    return times(_shift(x, 32), x.tasks)


def _routed_by_moments(x: Matrix) -> Work:
    """The same, with the moments of tokens that its Bayes router takes."""
    seen = times(product(x.columns, x.inputs, x.columns), x.tasks)
    return _routed(x) + seen + eigh(x.columns) + times(eigh(2 * x.columns), 0.5)


def _fitted(x: Matrix) -> Work:
    """The low-rank experts of ESMPPFit in one layer: both models' outputs, a ridge regression, its leading directions."""
    outputs = times(product(x.inputs, x.columns, x.rows), 3)
    moments = gram(x.inputs, x.columns) + Work({"bytes": 60 * x.inputs * (x.columns + x.rows), "calls": 100})
    return times(outputs + moments + _solved(x.columns, x.rows) + svd(x.rows, x.columns, 18), x.tasks)


@dataclass(frozen=True)
class Method:
    """How a method works, as far as its cost shows.

    Attributes:
        blocks: cost of a Linear layer's weight.
        kinds: which of a block's layers that is of: by their place in forward order, of ``in_proj``, ``out_proj``, ``c_fc`` and
            ``c_proj``.
        others: cost of the blocks' other matrices, and of those outside.
        outside: whether matrices outside of the blocks are merged so too: like ``others`` where those are given.
        passes: over all task vectors, by the bytes that are moved.
        visits: the same by the calls that are made; ``passes`` where ``None``.
        random: random numbers for each of their numbers.
        ranked: how often each of their numbers is sorted or ranked.
        forwards: of each proxy image through the tower.
        base: name of the method that it builds on by default.
        scaled: whether a scaling coefficient is searched.
        routing: how much longer than a plain encoder's the resulting model's forward pass takes, as a share of it, at a width of
            768; the share is larger for narrower ones.
    """

    blocks: Callable[[Matrix], Work] | None = None
    kinds: tuple[int, ...] = (0, 1, 2, 3)
    others: Callable[[Matrix], Work] | None = None
    outside: bool = True
    passes: float = 1.0
    visits: float | None = None
    random: float = 0.0
    ranked: float = 0.0
    forwards: float = 0.0
    base: str = ""
    scaled: bool = True
    routing: float = 0.0

    def work(self, sizes: Sizes) -> Work:
        """What the method does itself, without its base."""
        numbers, tensors = sizes.parameters * sizes.tasks, sizes.tensors * sizes.tasks
        visits = self.passes if self.visits is None else self.visits
        found = Work({"bytes": round(self.passes * _LOADED * numbers), "calls": round(visits * _CALLS * tensors)})
        found += Work({"random": round(self.random * numbers), "ranked": round(self.ranked * numbers)})
        found += Work({"images": round(self.forwards * sizes.proxies * sizes.tasks)})
        for place, matrix in enumerate(sizes.matrices()):
            cost = self.blocks if place % 4 in self.kinds else self.others
            found.update(cost(matrix) if cost else {})
        if (cost := self.others or self.blocks) and self.outside:
            found.update(total(map(cost, sizes.matrices(everywhere=True)[len(sizes.linears) :])))
        return found

    def slower(self, sizes: Sizes) -> float:
        """Time of the resulting model's forward pass, relative to the plain encoder's."""
        width = min(min(pair) for pair in sizes.linears)
        return 1 + self.routing * float((_WIDTH / width) ** 0.7)


METHODS: Mapping[str, Method] = {
    "Average": Method(visits=0.75),
    "TaskArithmetic": Method(visits=0.75),
    "TIES": Method(passes=1.2, visits=3.5),
    "Trim": Method(passes=2.0, visits=2.5, base="TaskArithmetic"),
    "Breadcrumbs": Method(ranked=1.6, passes=0.5, base="TaskArithmetic"),
    "ConsensusTA": Method(passes=2.0, visits=1.3),
    "DARE": Method(random=1.0, passes=0.5, base="TaskArithmetic"),
    "DELLA": Method(random=1.0, ranked=3.2, passes=1.0, base="TaskArithmetic"),
    "CART": Method(_cart, outside=False, passes=2.0, scaled=False),
    "STAR": Method(lambda x: _truncated(x, 0.3), passes=0.2, base="TaskArithmetic"),
    "EnergyRank": Method(lambda x: _truncated(x, 0.9), outside=False, passes=0.2, base="TaskArithmetic"),
    "SVC": Method(_calibrated, base="TaskArithmetic"),
    "SubspaceBoosting": Method(_reshaped, passes=0.1, base="TaskArithmetic"),
    "Isotropize": Method(lambda x: polar(x.rows, x.columns, x.length), passes=0.1, base="TaskArithmetic"),
    "LiNeS": Method(visits=0.5, base="TaskArithmetic"),
    "TSVM": Method(_tsvm),
    "IsoC": Method(_iso_c, passes=0.9, visits=1.0),
    "IsoCTS": Method(_iso_cts),
    "DCMerge": Method(_dc),
    "OPCM": Method(_opcm, outside=False, passes=1.5),
    "SWUDI": Method(_swudi, outside=False, passes=1.5),
    "RegMean": Method(_regression, outside=False, passes=3.0, forwards=1.0, scaled=False),
    "FeatCal": Method(_calibration, outside=False, passes=3.0, forwards=2.0, base="TaskArithmetic", scaled=False),
    # of the parts into which large models are cut, one; conjugate gradients take most of the time
    "FisherFit": Method(_fisher, outside=False, passes=2.0, forwards=4.0, base="ESM", scaled=False),
    "ESM": Method(_essential, kinds=(0, 2, 3), others=_tsvm, passes=2.0, forwards=1.0),
    "ESMPP": Method(_routed, kinds=(0, 2), outside=False, forwards=1.0, base="ESM", scaled=False, routing=0.09),
    "ESMPPBayes": Method(_routed_by_moments, kinds=(0, 2), outside=False, forwards=3.0, base="ESM", scaled=False, routing=0.17),
    "ESMPPFit": Method(_fitted, outside=False, passes=3.0, forwards=8.0, base="ESM", scaled=False, routing=1.18),
    "SMILE": Method(lambda x: _leading(x, 32), outside=False, scaled=False, routing=0.32),
    "EMR": Method(passes=2.2, visits=1.5, scaled=False),
    "TALLMasks": Method(passes=1.7, visits=1.5, scaled=False),
    "TSVC": Method(lambda x: _leading(x, x.side // x.tasks), scaled=False),
}
"""The package's own methods, with their default parameters."""


def method_of(merger: Merger) -> Method | None:
    """How a method works; ``None`` where nothing is known of it."""
    own = type(merger).__module__.startswith("mergekit_vision.plugins.")
    return METHODS.get(type(merger).__name__) if own else None


def merge_work(merger: Merger, sizes: Sizes) -> Work | None:
    """What merging costs by a method and those that it builds on; ``None`` where nothing is known of one of them."""
    method, base = method_of(merger), getattr(merger, "base", None)
    if method is None:
        return None
    below: Work | None = METHODS[method.base].work(sizes) if method.base else Work()
    if isinstance(base, Merger):
        below = merge_work(base, sizes)
    return None if below is None else method.work(sizes) + below


def is_scaled(merger: Merger) -> bool:
    """Whether a coefficient is searched: that of the method, or of one that it builds on; of an unknown method, its own."""
    method, base = method_of(merger) or Method(), getattr(merger, "base", None)
    if isinstance(base, Merger):
        return method.scaled or is_scaled(base)
    return method.scaled or (method.base != "" and METHODS[method.base].scaled)
