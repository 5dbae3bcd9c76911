"""Counts of what methods compute, against counts by hand."""

import pytest

from mergekit_vision import registry
from mergekit_vision.functional.gram import GRAM_BLOCK
from mergekit_vision.functional.polar_columns import SIDE
from mergekit_vision.merger import Merged, MergeInputs, Merger
from mergekit_vision.merging.costs import METHODS, merge_work
from mergekit_vision.merging.work import Matrix, Sizes, Work, eigh, gram, polar_product, product, svd
from mergekit_vision.plugins.average import Average
from mergekit_vision.plugins.dare import DARE
from mergekit_vision.plugins.esm import ESM
from mergekit_vision.plugins.tsvm import TSVM

BLOCK = "visual.transformer.resblocks.0."
SHAPES: dict[str, tuple[int, ...]] = {
    "visual.conv1.weight": (8, 3, 4, 4),
    "visual.positional_embedding": (10, 8),
    "visual.proj": (8, 6),
    f"{BLOCK}ln_1.weight": (8,),
    f"{BLOCK}attn.in_proj_weight": (24, 8),
    f"{BLOCK}attn.out_proj.weight": (8, 8),
    f"{BLOCK}mlp.c_fc.weight": (32, 8),
    f"{BLOCK}mlp.c_proj.weight": (8, 32),
}
NUMBERS = 384 + 80 + 48 + 8 + 192 + 64 + 256 + 256
TASKS, PROXIES = 4, 5
SIZES = Sizes.of(SHAPES, TASKS, PROXIES)


class Foreign(Merger):
    """A method of someone else's."""

    def merge(self, inputs: MergeInputs) -> Merged:
        return Merged({})


def test_sizes_are_those_of_the_tower() -> None:
    assert SIZES.linears == ((24, 8), (8, 8), (32, 8), (8, 32))
    assert SIZES.outside == ((10, 8), (8, 6))
    assert (SIZES.parameters, SIZES.tensors, SIZES.tokens) == (NUMBERS, 8, 10)
    assert SIZES.matrices(everywhere=True)[-1] == Matrix(8, 6, TASKS, PROXIES * 10)


def test_building_blocks() -> None:
    assert gram(100, 8)["float64"] == 2 * 100 * 8 * 8  # too small for one triangle alone
    assert gram(100, 1024)["float64"] == 100 * 1024 * (1024 + GRAM_BLOCK)
    assert svd(8, 100, 3)["float64"] == svd(100, 8, 3)["float64"] == 2 * 100 * 8 * 8 + 2 * 100 * 8 * 3
    assert svd(8, 100, 3)["eigh"] == 8**3
    small = polar_product(8, 8, 32, single=True)
    assert (small["eigh"], small["polar"]) == (2 * 8**3, 0)
    large = polar_product(2 * SIDE, SIDE, 8, single=True)
    assert (large["eigh"], large["polar"], large["float32"]) == (8**3, SIDE**3, 2 * 2 * SIDE * SIDE * 8)
    assert polar_product(2 * SIDE, SIDE, 8, single=False)["polar"] == 0


def test_a_method_without_decompositions_only_reads() -> None:
    work = merge_work(Average(), SIZES)
    assert work is not None
    assert {unit for unit, amount in work.items() if amount} == {"bytes", "calls"}
    assert work["bytes"] == 28 * NUMBERS * TASKS


def test_tsvm_decomposes_every_matrix_of_every_task() -> None:
    work = merge_work(TSVM(), SIZES)
    assert work is not None
    # each task's matrix, and the two polar factors, all of the smaller side rounded down to a multiple of the tasks
    sides = [8, 8, 8, 8, 8, 6]
    assert work["eigh"] == sum(TASKS * side**3 + 2 * (side // TASKS * TASKS) ** 3 for side in sides)
    assert work["images"] == 0


def test_esm_runs_every_proxy_image_once() -> None:
    work = merge_work(ESM(), SIZES)
    assert work is not None
    assert work["images"] == TASKS * PROXIES
    # per task: shifts of c_proj, deltas by the root of the inputs' Gram, and coordinates and products of all three layers
    shifts = 2 * (PROXIES * 10) * 32 * 8
    through = 2 * 24 * 8 * 8 + 2 * 32 * 8 * 8
    merged = 2 * 2 * ((24 // 4) * 24 * 8 + (32 // 4) * 32 * 8 + (8 // 4) * 8 * 32)
    assert work["float32"] == TASKS * (shifts + through + merged)


def test_more_of_anything_costs_no_less() -> None:
    for name in METHODS:
        merger = registry.get(name)()
        more = [Sizes.of(SHAPES, 2 * TASKS, PROXIES), Sizes.of(SHAPES, TASKS, 2 * PROXIES)]
        work, *larger = (_cost(merger, sizes) for sizes in (SIZES, *more))
        assert larger[0] > work, name
        assert (larger[1] > work) == (merger.needs == "proxies"), name


def _cost(merger: Merger, sizes: Sizes) -> int:
    found = merge_work(merger, sizes)
    assert found is not None
    return sum(found.values())


def test_the_base_counts_too() -> None:
    found = [merge_work(DARE(base=base), SIZES) for base in (None, TSVM())]
    work, with_base = (part or Work() for part in found)
    assert work["eigh"] == 0
    assert with_base["eigh"] == (merge_work(TSVM(), SIZES) or Work())["eigh"]


def test_nothing_is_known_of_other_peoples_methods() -> None:
    assert merge_work(Foreign(), SIZES) is None
    assert merge_work(DARE(base=Foreign()), SIZES) is None


def test_every_method_of_the_package_is_listed() -> None:
    own = {name for name, merger in registry.mergers().items() if merger.__module__.startswith("mergekit_vision.plugins.")}
    assert METHODS.keys() == own


@pytest.mark.parametrize(("work", "flops"), [(product(2, 3, 4), 48), (eigh(7), 0)])
def test_products(work: Work, flops: int) -> None:
    assert work["float64"] == flops
