"""Recipes: the settings of a training run, as typed data, read from YAML and written back."""

from __future__ import annotations

from .model import BackboneChoice, InjectionConfig, ModelConfig
from .schema import AS_MODEL, PARTS, STAGES, CacheType, LoraConfig, Recipe, StageConfig, ValidationConfig
from .values import decode
from .yaml_io import dump_recipe, load_recipe, parse_overrides, recipe_names

__all__ = [
    "AS_MODEL",
    "PARTS",
    "STAGES",
    "BackboneChoice",
    "CacheType",
    "InjectionConfig",
    "LoraConfig",
    "ModelConfig",
    "Recipe",
    "StageConfig",
    "ValidationConfig",
    "decode",
    "dump_recipe",
    "load_recipe",
    "parse_overrides",
    "recipe_names",
]
