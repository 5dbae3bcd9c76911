"""TIES: trim, elect sign, disjoint merge.

Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (NeurIPS 2023), algorithm 1.

Both steps are bound by memory traffic, so neither ever writes a task vector out: fine-tuned and pre-trained weights are
subtracted in pieces that stay in the processor's cache until they are done with.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from mergekit_vision.functional.threads import in_threads

Aggregate = Literal["mean", "sum", "max"]
Pairs = Iterable[tuple[Tensor, Tensor]]
"""Fine-tuned and pre-trained values of each tensor of one task."""
Result = TypeVar("Result")

SAMPLE = 1 << 16  # entries looked at to guess a threshold; more of them take longer to sort than they save
DEVIATIONS = 3  # half width of the first guess, in standard deviations of a sampled rank
SPAN = 4  # pieces that a thread works through at a time
LANES = 8  # entries that are tested for the guess together


class TiesMerge(NamedTuple):
    """One merged tensor, and what the sign of exact cancellations needs to know about it.

    Attributes:
        merged: shape of one task's tensor, float32.
        votes: sum of the elected signs over the entries.
        canceled: whether trimmed entries of the tasks, not all zero, add up to exactly zero somewhere.
    """

    merged: Tensor
    votes: int
    canceled: bool


def magnitude_threshold(
    tensors: Callable[[], Pairs],
    density: float,
    count_frozen: int = 0,
    device: torch.device | None = None,
    entries: int | None = None,
) -> float:
    """The magnitude from which the entries of a task vector are kept, exact, without putting the task vector in one piece.

    With ``P`` entries it is the ``m``-th smallest magnitude, ``m = P - ⌊P · density⌋``. Keeping what is not smaller leaves one
    entry more than ``⌊P · density⌋`` (and ties): the published code does so. ``m = 0`` keeps everything.

    A sample cuts the magnitudes into ranges, most finely about its own quantile. One range after the other, from the likeliest
    on, its entries are put aside and what lies below is counted, until the ``m``-th smallest is found to be inside.

    Args:
        tensors: called a few times, mostly three; gives the fine-tuned and the pre-trained values of every tensor of the task, of
            any dtype. Their differences, in float32, make up the task vector.
        density: share of the entries to keep, in (0, 1].
        count_frozen: further entries, all zero, that count towards ``P``.
        device: where to compute; by default the CPU.
        entries: how many the tensors have, which spares the first of the calls.

    Raises:
        ValueError: when the task vector holds NaN or infinity.

    >>> base = torch.zeros(2)
    >>> magnitude_threshold(lambda: [(torch.tensor([-1.0, 2.0]), base), (torch.tensor([3.0, -4.0]), base)], density=0.25)
    3.0
    """
    entries = sum(pre_trained.numel() for _, pre_trained in tensors()) if entries is None else entries
    total = entries + count_frozen
    # the frozen entries are the smallest there are
    m = total - math.floor(total * density) - count_frozen
    if m <= 0:
        return 0.0
    device = device or torch.device("cpu")
    sample = _sample(tensors(), entries, device)
    if not sample[-1] < math.inf:  # sorted, NaN last
        raise ValueError("the task vector holds NaN or infinity")
    ranges, i = _ranges(sample, m / entries)
    while True:
        below, inside, kept = _search(tensors(), *ranges[i], device)
        if m <= below:
            i -= 1
        elif m > below + inside:
            i += 1
        else:
            return kept.kthvalue(m - below).values.item() if len(kept) else ranges[i][0]


def ties_merge(
    experts: Sequence[Tensor],
    base: Tensor,
    thresholds: Sequence[float],
    aggregate: Aggregate = "mean",
    tie_sign: int = 1,
    device: torch.device | None = None,
) -> TiesMerge:
    """Trim, elect and merge one tensor of all tasks.

    Args:
        experts: fine-tuned tensor of each task, any dtype.
        base: pre-trained tensor.
        thresholds: of each task; entries of ``expert - base`` (float32) of smaller magnitude are trimmed
            (:func:`magnitude_threshold`).
        aggregate: of the entries that have the elected sign: their mean, sum, or the one of largest magnitude.
        tie_sign: sign elected where the tasks cancel exactly: -1, 0 or 1. Published: the sign of :attr:`TiesMerge.votes` summed
            over the whole model.
        device: where to compute and to put the result; by default the CPU.

    >>> experts = [torch.tensor([1.0, 4.0, 0.1]), torch.tensor([3.0, -5.0, 0.2])]
    >>> ties_merge(experts, torch.zeros(3), thresholds=[1.0, 1.0]).merged
    tensor([ 2., -5.,  0.])
    """
    device = device or torch.device("cpu")
    sources, pre_trained = [expert.flatten() for expert in experts], base.flatten()
    # hardshrink keeps what exceeds its limit, and here the threshold itself is kept
    limits = [max(0.0, _next(threshold, -math.inf)) for threshold in thresholds]
    merged = torch.empty(len(pre_trained), device=device)

    def merge_span(span: slice) -> tuple[int, bool]:
        return _merge_span([source[span] for source in sources], pre_trained[span], limits, aggregate, tie_sign, merged[span])

    found = _each(merge_span, _parts(len(pre_trained), SPAN * max(1, _piece(device) // len(experts))))
    return TiesMerge(merged.view(base.shape), sum(votes for votes, _ in found), any(canceled for _, canceled in found))


def _merge_span(
    sources: list[Tensor], pre_trained: Tensor, limits: list[float], aggregate: Aggregate, tie_sign: int, out: Tensor
) -> tuple[int, bool]:
    """Merge flat tensors into ``out``, piece by piece; ``votes`` and ``canceled`` of :class:`TiesMerge`."""
    tasks, piece = len(sources), max(1, _piece(out.device) // len(sources))
    blocks = torch.empty(2, tasks * min(piece, len(out)), device=out.device)
    votes, canceled = 0, False
    for part in _parts(len(out), piece):
        start = _float32(pre_trained[part], out.device)
        trimmed, work = (block[: tasks * len(start)].view(tasks, -1) for block in blocks)
        for row, source, limit in zip(trimmed, sources, limits, strict=True):
            torch.sub(_float32(source[part], out.device), start, out=row)
            torch.hardshrink(row, limit, out=row)
        part_votes, part_canceled = _merge_part(trimmed, work, aggregate, tie_sign, out[part])
        votes, canceled = votes + part_votes, canceled or part_canceled
    return votes, canceled


def _merge_part(trimmed: Tensor, work: Tensor, aggregate: Aggregate, tie_sign: int, out: Tensor) -> tuple[int, bool]:
    """Elect and merge ``trimmed`` ``[T, n]`` into ``out`` ``[n]``; ``work`` is memory of the size of ``trimmed``.

    Returns:
        ``votes`` and ``canceled`` of :class:`TiesMerge`.
    """
    total = trimmed.sum(0)
    elected = torch.ones_like(total).copysign_(total)
    result = torch.mul(trimmed, elected, out=work).relu_().sum(0)
    canceled = False
    # A float32 sum of T terms is off by less than T 2^-24 times the sum of their magnitudes. Where its sign is in doubt that is,
    # to rounding, twice the sum of those that agree; another factor of 2 is margin. Scaled up, the smallest numbers count too.
    doubt = torch.sub(result, total.abs(), alpha=2**22 / len(trimmed))
    if float(doubt.amax()) > 0:
        columns = (doubt > 0).nonzero().squeeze(1)
        doubted = trimmed[:, columns]
        # float64: whether entries cancel must not depend on the order of the tasks
        signs = doubted.sum(0, dtype=torch.float64).sign().float()
        canceled = not bool(signs.all())
        total[columns] = signs
        elected[columns] = signs.masked_fill(signs == 0, tie_sign)
        work[:, columns] = agreeing = doubted.mul_(elected[columns]).relu_()
        result[columns] = agreeing.sum(0)
    if aggregate == "max":
        result = work.amax(0)
    elif aggregate == "mean":
        result /= work.sign_().sum(0).clamp_(min=1)
    torch.mul(result, elected, out=out)
    return int(total.sign_().sum()), canceled


def _sample(pairs: Pairs, entries: int, device: torch.device) -> Tensor:
    """Magnitudes of evenly spread entries of a task vector, sorted."""
    # no common factor with the widths of layers, which are products of 2 and 3: the sample meets all columns
    stride, seen, parts = 6 * (entries // (6 * SAMPLE)) + 1, 0, []
    for fine_tuned, pre_trained in pairs:
        chosen = slice(-seen % stride, None, stride)
        parts.append(_float32(fine_tuned.flatten()[chosen], device) - _float32(pre_trained.flatten()[chosen], device))
        seen += pre_trained.numel()
    return torch.cat(parts).abs_().sort().values


def _ranges(sample: Tensor, share: float) -> tuple[list[tuple[float, float]], int]:
    """Ranges ``[low, high)`` that cover all magnitudes, and which of them is likely to hold the ``share`` quantile.

    Wider ones lie around the likeliest. The sampled numbers that part them are ranges of their own, so that a magnitude that
    very many entries have, as those of coarsely rounded checkpoints, is never in one with others.
    """
    n = len(sample)
    rank, half = share * n, 1 + DEVIATIONS * math.sqrt(n * share * (1 - share))
    cuts = set()
    while half < n:
        cuts |= {float(sample[int(place)]) for place in (rank - half, rank + half) if 0 <= place < n}
        half *= 4
    edges = sorted({0.0, math.inf, *cuts, *(_next(cut, math.inf) for cut in cuts)})
    return list(pairwise(edges)), bisect_right(edges, float(sample[min(int(rank), n - 1)])) - 1


def _search(pairs: Pairs, low: float, high: float, device: torch.device) -> tuple[int, int, Tensor]:
    """How many magnitudes are below ``low``, how many in ``[low, high)``, and the latter, unless they are all ``low``."""
    below, inside, kept = 0, 0, [torch.empty(0, device=device)]
    for pair in pairs:
        end, start = (values.flatten() for values in pair)

        def search_span(span: slice, end: Tensor = end, start: Tensor = start) -> tuple[int, int, list[Tensor]]:
            return _search_span(end[span], start[span], low, high, device)

        for span_below, span_inside, span_kept in _each(search_span, _parts(len(start), SPAN * _piece(device) // 2)):
            below, inside = below + span_below, inside + span_inside
            kept += span_kept
    return below, inside, torch.cat(kept)


def _search_span(end: Tensor, start: Tensor, low: float, high: float, device: torch.device) -> tuple[int, int, list[Tensor]]:
    """:func:`_search` in a part of a tensor."""
    below, inside, kept = 0, 0, []
    single, piece = _next(low, math.inf) == high, _piece(device) // 2
    memory = torch.empty(2, min(piece, len(start)), device=device)
    for part in _parts(len(start), piece):
        n = part.stop - part.start
        # one lane where they do not divide; comparing into float32 and summing lanes are much faster than a mask's selection
        magnitudes, tests = (row[:n].view(LANES if n % LANES == 0 else 1, -1) for row in memory)
        torch.sub(_float32(end[part], device), _float32(start[part], device), out=magnitudes.view(-1)).abs_()
        if not float(magnitudes.amax()) < math.inf:
            raise ValueError("the task vector holds NaN or infinity")
        under_low, under_high = (torch.lt(magnitudes, bound, out=tests).sum(0) for bound in (low, high))
        lower = int(under_low.sum())
        below, inside = below + lower, inside + int(under_high.sum()) - lower
        if not single:
            candidates = magnitudes.index_select(1, (under_low != under_high).nonzero().squeeze(1)).flatten()
            kept.append(candidates[(candidates >= low) & (candidates < high)])
    return below, inside, kept


def _each(function: Callable[[slice], Result], spans: Iterable[slice]) -> list[Result]:
    """Results of all spans, found by several threads where there are several spans.

    Every thread works through its own: operations on pieces that fit the cache are too short to be shared one by one.
    """
    spans = list(spans)
    return [function(span) for span in spans] if len(spans) < 2 else in_threads(function, spans)


def _piece(device: torch.device) -> int:
    """Entries that are worked on at once: what a processor's cache holds twice, or enough to keep a GPU busy."""
    return 1 << 18 if device.type == "cpu" else 1 << 24


def _parts(length: int, piece: int) -> Iterator[slice]:
    return (slice(start, min(start + piece, length)) for start in range(0, length, piece))


def _float32(values: Tensor, device: torch.device) -> Tensor:
    return values.to(device, torch.float32)


def _next(number: float, towards: float) -> float:
    """The float32 next to a float32."""
    return torch.nextafter(torch.tensor(number), torch.tensor(towards)).item()
