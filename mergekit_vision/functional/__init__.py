"""Pure tensor functions behind the merging methods: one file a method's math, and the linear algebra they share.

Nothing here knows a model, a file or a merger, and nothing but torch is imported.
"""

from mergekit_vision.functional.dc import dc_merge
from mergekit_vision.functional.esd import CompactSubspace, EssentialSubspace, RowGram, ShiftStatistic, essential_subspace
from mergekit_vision.functional.esm import EssentialPart, esm_merge, esm_merge_of, inter_layer_factors
from mergekit_vision.functional.halley import Polar
from mergekit_vision.functional.iso import flat_spectrum, iso_cts_merge
from mergekit_vision.functional.linalg import (
    PolarProduct,
    TopSVD,
    pad_rank,
    polar,
    polar_product,
    top_svd,
    top_svd_of_product,
)
from mergekit_vision.functional.ties import TiesMerge, magnitude_threshold, ties_merge
from mergekit_vision.functional.tsvm import tsvm_merge, tsvm_merge_of

__all__ = [
    "CompactSubspace",
    "EssentialPart",
    "EssentialSubspace",
    "Polar",
    "PolarProduct",
    "RowGram",
    "ShiftStatistic",
    "TiesMerge",
    "TopSVD",
    "dc_merge",
    "esm_merge",
    "esm_merge_of",
    "essential_subspace",
    "flat_spectrum",
    "inter_layer_factors",
    "iso_cts_merge",
    "magnitude_threshold",
    "pad_rank",
    "polar",
    "polar_product",
    "ties_merge",
    "top_svd",
    "top_svd_of_product",
    "tsvm_merge",
    "tsvm_merge_of",
]
