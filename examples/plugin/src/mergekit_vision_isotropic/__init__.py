"""Isotropic merging as a plugin of mergekit-vision."""

from mergekit_vision_isotropic.method import Isotropic, isotropic

__all__ = ["Isotropic", "isotropic"]
