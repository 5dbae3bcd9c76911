"""Isotropic merging as a plugin of mergekit-vision."""

from mergekit_vision_isoc.isoc import IsoC, isotropic

__all__ = ["IsoC", "isotropic"]
