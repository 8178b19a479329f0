"""Families of models as data: config maps and weight-name maps between transformers' models and ours."""

from trimaran.models.huggingface.family import Family
from trimaran.models.huggingface.registry import FAMILIES, family_for, family_of
from trimaran.models.huggingface.weights import Stored, WeightMap, locate, resolve

__all__ = ["FAMILIES", "Family", "Stored", "WeightMap", "family_for", "family_of", "locate", "resolve"]
