"""Backbones from timm: CLIP, SigLIP, EVA02, DINOv2, DINOv3, AIMv2, BEiT, Swin, Hiera, SAM and more."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from layerfuse._hub import FETCH_ERRORS, why_not_fetched
from layerfuse.backbones._timm_facts import cut_timm_tail, resize_timm_model, timm_facts
from layerfuse.backbones._timm_stages import STAGED
from layerfuse.backbones.base import BACKBONES, Backbone, as_pair
from layerfuse.errors import InputError, MissingFileError
from layerfuse.layers import LayerChoice
from layerfuse.preprocessing import PatchBatch, Preprocessing

__all__ = ["TimmBackbone"]

# Where weights come from is no part of the architecture.
_SOURCES = ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")
# Of timm.models, where Vision Transformers are that can be tapped.
_MODULES = ("beit", "deit", "eva", "naflexvit", "vision_transformer", *STAGED)


@BACKBONES.register("timm")
class TimmBackbone(Backbone):
    """A timm VisionTransformer, Eva, Beit, NaFlexVit or one built alike, or a hierarchical one: Swin, Hiera, SAM, ….

    Other arguments and errors are `Backbone`'s.

    Args:
        model: from ``timm.create_model``.
        image_size: as in `Backbone.from_name`; position embeddings are resampled.
        preprocessing: from the model's ``pretrained_cfg`` if None.

    Raises:
        ValueError: if the model is no Vision Transformer that can be tapped, or the size is not possible.
    """

    family = "timm"
    library = "timm"

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: LayerChoice,
        image_size: int | tuple[int, int] | None = None,
        preprocessing: Preprocessing | None = None,
        _recipe: Mapping[str, Any] | None = None,
    ) -> None:
        facts = timm_facts(model)
        recipe = _recipe if _recipe is not None else _recipe_of(model)
        if image_size is not None:
            facts = resize_timm_model(model, facts, as_pair(image_size))
            recipe = None if recipe is None else {**recipe, "image_size": list(facts.image_size)}
        super().__init__(model, layers=layers, facts=facts, recipe=recipe)
        if preprocessing is not None:
            self.preprocessing = preprocessing

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        layers: LayerChoice,
        pretrained: bool = True,
        image_size: int | tuple[int, int] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> TimmBackbone:
        """Build a timm model as `Backbone.from_name` says.

        ``name`` has a tag, such as ``"vit_large_patch14_clip_quickgelu_336.openai"`` (without a tag timm takes its
        default, which for CLIP is LAION's), or is ``"hf-hub:owner/name"`` or ``"local-dir:path"``. For another
        ``image_size`` position embeddings are resampled. ``options`` are those of ``timm.create_model``: the model's
        constructor arguments (``dynamic_img_size=True`` lets a VisionTransformer or Eva take every multiple of its
        patch size), or ``checkpoint_path`` for local weights.
        """
        given = dict(options or {})
        model = _create(name, pretrained=pretrained, options=given)
        architecture = {key: value for key, value in given.items() if key not in _SOURCES}
        recipe: dict[str, Any] | None = {"name": name, "options": architecture, "image_size": None}
        # Hub and folder names would have to be read again; what they said is kept instead, where timm tells it.
        if ":" in name:
            recipe = _recipe_of(model)
        return cls(model, layers=layers, image_size=image_size, _recipe=recipe)

    @classmethod
    def rebuild(cls, recipe: Mapping[str, Any], *, layers: Sequence[int]) -> TimmBackbone:
        """Build a recipe as `Backbone.rebuild` says."""
        # A config that came from elsewhere must not choose files to load either.
        options = {key: value for key, value in recipe["options"].items() if key not in _SOURCES}
        model = _create(recipe["name"], pretrained=False, options=options)
        return cls(model, layers=layers, image_size=recipe["image_size"], _recipe=dict(recipe))

    @classmethod
    def list_names(cls) -> list[str]:
        """Return Vision Transformers with tags of weights, such as ``"vit_tiny_patch16_224.augreg_in21k"``."""
        import timm

        return sorted(name for module in _MODULES for name in timm.list_models(module=module, pretrained=True))

    def cut_tail(self, model: nn.Module) -> None:
        """Remove final norm, pooling and head from the model."""
        cut_timm_tail(model)

    def run_patches(self, batch: PatchBatch) -> None:
        """Call the model with patches, where each lies in its picture, and the mask of the padding."""
        self.model(batch.patches, patch_coord=batch.coordinates, patch_valid=batch.mask)


def _create(name: str, *, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    import timm

    if ":" not in name:
        _check_name(name)
    weights = options.get("checkpoint_path")
    if weights and not Path(weights).is_file():
        raise MissingFileError(f"{weights} is no file, so {name!r} has no weights; give the path of a file of weights.")
    try:
        return timm.create_model(name, pretrained=pretrained, **{"num_classes": 0, **options})
    except TypeError as error:
        raise InputError(
            f"timm model {name!r} cannot be built with the options {dict(options)}: {error}. Options are the model's "
            "constructor arguments; see help(timm.create_model) and the model's class."
        ) from error
    except FETCH_ERRORS as error:
        # A hub's or a folder's name needs a config, too, which no random weights replace.
        without = "" if ":" in name else ", or pass pretrained=False (--pretrained false)"
        raise InputError(
            f"timm cannot load {name!r}: {why_not_fetched(error)}. Check the name (`layerfuse models` lists some), "
            f"fill the cache where there is a network, or give a folder (timm:local-dir:FOLDER){without}."
        ) from error
    except RuntimeError as error:  # weights of other shapes; of a file, timm resamples none
        if "checkpoint_path" not in options:
            raise
        raise InputError(
            f"the weights of {options['checkpoint_path']} do not fit {name!r} with the options {dict(options)}. If "
            "they are of another image size, say theirs in the options (img_size) and the one that is wanted as "
            f"image_size=…, which resamples them. timm says: {error}"
        ) from error


def _check_name(name: str) -> None:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = timm.list_models()
        nearest = difflib.get_close_matches(architecture, known, n=3, cutoff=0.5)
        raise InputError(
            f"timm model {architecture!r} is unknown; did you mean {' or '.join(map(repr, nearest)) or 'another'}? "
            f"Known: {len(known)} names; layerfuse.list_backbones('timm', '*clip*') lists Vision Transformers."
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise InputError(
            f"timm model {architecture!r} has no pretrained tag {tag!r}; known tags: {', '.join(tags) or 'none'}."
        )


def _recipe_of(model: nn.Module) -> dict[str, Any] | None:
    # timm >= 1.0.31 notes the constructor's arguments; before, an instance does not tell how it was made.
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    arguments = getattr(model, "_model_args", None)
    if not name or arguments is None:
        return None
    return {"name": name, "options": dict(arguments), "image_size": None}
