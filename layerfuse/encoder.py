"""A backbone and a fuser joined: images in, fused visual tokens out.

This is where layerfuse ends; a projector and a language model come after it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from huggingface_hub import ModelHubMixin
from torch import nn

from layerfuse._each_picture import fuse_each
from layerfuse._encoder_files import CONFIG_FILE, WEIGHTS_FILE, fetch_encoder, read_encoder_config
from layerfuse.backbones import AnyBackbone, backbone_from_config, create_backbone, create_backbone_group
from layerfuse.backbones._creation import as_device, as_dtype, named_once
from layerfuse.errors import InputError, InvalidTypeError
from layerfuse.features import Grid
from layerfuse.files import atomic_folder
from layerfuse.fusers import Fuser, FuserCost, create_fuser, fuser_from_config, source_layers
from layerfuse.fusers.creation import fuser_class_for
from layerfuse.layers import LayerChoice
from layerfuse.preprocessing import AnyPreprocessing, Images, PatchBatch, holds_patches
from layerfuse.weights import fitting_weights, load_weights, save_weights

__all__ = ["FusedEncoder", "check_fuser_fits", "create_encoder"]

_CARD_FILE = "README.md"


class FusedEncoder(
    nn.Module,
    ModelHubMixin,
    library_name="layerfuse",
    tags=["layerfuse", "feature-fusion", "vision-transformer"],
):
    """A backbone whose tapped layers a fuser turns into one set of visual tokens.

    Saves as ``config.json`` and ``model.safetensors`` (``save_pretrained``, ``push_to_hub``), and loads with
    ``FusedEncoder.from_pretrained(folder_or_hub_name)``.

    Args:
        backbone: taps L layers; or a `BackboneGroup`, which taps them in several backbones.
        fuser: takes L maps of these widths.

    Raises:
        ValueError: if the fuser was built for another number of layers or other widths than the backbone gives.
    """

    def __init__(self, backbone: AnyBackbone, fuser: Fuser) -> None:
        super().__init__()
        check_fuser_fits(backbone, fuser)
        self.backbone = backbone
        self.fuser = fuser

    @overload
    def forward(self, images: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor: ...

    @overload
    def forward(
        self, images: PatchBatch | Mapping[str, Any], condition: torch.Tensor | None = None
    ) -> list[torch.Tensor]: ...

    def forward(
        self, images: torch.Tensor | PatchBatch | Mapping[str, Any], condition: torch.Tensor | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Encode images as fused visual tokens (B, N, C_out); pictures of several grids as a list of (N_i, C_out).

        Args:
            images: (B, 3, height, width) in pixels, normalised as `prepare` does it; of several backbones
                (B, 3 * backbones, height, width), see `BackboneGroup`. Or patches with their grids, as
                `prepare_patches` or a library's processor makes them, see `Backbone.forward`.
            condition: (B, D_c), such as an embedding of each image's question, for a fuser with ``condition_channels``.

        Raises:
            ValueError: if the backbone cannot take the image size, or the fuser the condition.
        """
        features = self.backbone(images)
        if isinstance(features, list):
            return fuse_each(self.fuser, features, condition)
        tokens: torch.Tensor = self.fuser(features, condition)
        return tokens

    def maps(self, images: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Encode images as one fused map (B, C_out, H, W) on the grid of `grid`, without tokens that lie in no cell.

        The maps that go into the fuser are `Backbone.maps`, of ``encoder.backbone``. Arguments are those of `forward`.

        Raises:
            ValueError: if the fused tokens lie on no grid; else as `forward`.
        """
        if holds_patches(images):
            raise InputError(
                "a map is of images of one size; of patches, encoder(patches) gives each picture's tokens."
            )
        if self.grid() is None:
            raise InputError(
                f"the tokens of fuser {self.fuser.name!r} lie on no grid, so they make no map; take a fuser that "
                "keeps the grid, such as 'mmfuser' or 'concat', or the maps before it: encoder.backbone.maps(images)."
            )
        tokens: torch.Tensor = self(images, condition)
        grids = self.backbone.grids(images.shape[2:])
        (height, width), front = self.fuser.out_grid(grids) or (0, 0), self.fuser.extra_tokens(grids).front
        return tokens[:, front : front + height * width].transpose(1, 2).unflatten(2, (height, width))

    @property
    def preprocessing(self) -> AnyPreprocessing:
        """The preprocessing that the backbone wants for its images."""
        return self.backbone.preprocessing

    @property
    def out_channels(self) -> int:
        """C_out, the width of the fused tokens."""
        return self.fuser.out_channels

    def num_tokens(self, size: int | Sequence[int] | None = None) -> int:
        """Return the number N of tokens that an image becomes, of a ``size`` as in `Backbone.grids`; nothing is run."""
        return self.fuser.num_tokens(self.backbone.grids(size))

    def grid(self, size: int | Sequence[int] | None = None) -> Grid | None:
        """Return the grid (H, W) of the fused tokens, of images of a ``size`` as in `Backbone.grids`; nothing is run.

        None if the tokens lie on no grid.
        """
        return self.fuser.out_grid(self.backbone.grids(size))

    def prepare(self, images: Images) -> torch.Tensor:
        """Return the encoder's input, (B, channels, height, width), from pictures; see `Backbone.prepare`."""
        return self.backbone.prepare(images)

    def prepare_patches(self, images: Images, *, max_num_patches: int | None = None) -> PatchBatch:
        """Return pictures as patches, each in its own aspect ratio; see `Backbone.prepare_patches`."""
        return self.backbone.prepare_patches(images, max_num_patches=max_num_patches)

    def freeze_backbone(self) -> FusedEncoder:
        """Turn gradients off for the backbone, which stays in evaluation mode whatever ``train()`` is called later.

        Returns the same encoder.
        """
        self.backbone.freeze()
        return self

    def cost(self, image_size: int | Sequence[int] | None = None) -> FuserCost:
        """Return the fuser's parameters, channels, tokens and FLOPs per image of a size as in `Backbone.grids`."""
        return self.fuser.cost(self.backbone.grids(image_size))

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able description from which the same architecture is rebuilt."""
        return {"backbone": _inside(self.backbone).config, "fuser": _inside(self.fuser).config}

    def save_pretrained(  # type: ignore[override]  # named arguments where the mixin takes any
        self,
        save_directory: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        commit_message: str = "Push model using huggingface_hub.",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        delete_patterns: list[str] | str | None = None,
    ) -> str | None:
        """Write config, weights and, where there is none, a model card: whole or not at all.

        Whatever stops it, the folder holds the earlier model, this one, or nothing that loads. It is made if need be;
        an encoder in it is replaced. The encoder's own config is written, whatever `push_to_hub` of huggingface_hub
        hands over as ``config``. With ``push_to_hub`` the encoder also goes to ``repo_id`` (None: the folder's name) on
        the hub; the arguments from ``commit_message`` on are for that. ``model_card_kwargs`` are for the card's
        template.

        Returns:
            The address of the commit if it went to the hub.

        Raises:
            ValueError: before anything is written, if a weight is none of those that the config describes (adapters,
                changed modules); the message lists them.
            OSError: if the folder cannot be written to; an earlier model stays.
        """
        folder = Path(save_directory)
        described = self.config
        weights = fitting_weights(
            self,
            lambda: FusedEncoder(backbone_from_config(described["backbone"]), fuser_from_config(described["fuser"])),
        )
        with atomic_folder(folder) as scratch:
            save_weights(self, weights, scratch / WEIGHTS_FILE)
            (scratch / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            if not (folder / _CARD_FILE).exists():
                self.generate_model_card(**model_card_kwargs or {}).save(scratch / _CARD_FILE)
        if not push_to_hub:
            return None
        url: str = self.push_to_hub(
            repo_id or folder.name,
            commit_message=commit_message,
            private=private,
            token=token,
            branch=branch,
            create_pr=create_pr,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
            delete_patterns=delete_patterns,
            model_card_kwargs=model_card_kwargs,
        )
        return url

    @classmethod
    def from_pretrained(  # type: ignore[override]  # named arguments where the mixin takes any
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backbone: AnyBackbone | None = None,
        fuser: Fuser | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: Mapping[str, Any] | torch.device | str | None = None,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> FusedEncoder:
        """Return an encoder that `save_pretrained` wrote, from a folder or a name on the hub, in evaluation mode.

        A ``backbone`` or a ``fuser`` that is given takes the weights instead of one that is built from the config.
        ``dtype`` is for all weights, such as torch.bfloat16 or its name; None or "auto" keeps what was saved.
        ``device`` is where the encoder goes, the CPU if None; ``device_map`` says the same in transformers' words: one
        device for all, also as ``{"": device}``. The arguments from ``force_download`` on are those of
        huggingface_hub's `snapshot_download`.

        Raises:
            FileNotFoundError: if there is no such encoder.
            ValueError: if config or weights are damaged or do not fit one another, or dtype or device is none.
        """
        precision, place = as_dtype(dtype), as_device(device, device_map)
        folder = fetch_encoder(
            pretrained_model_name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        config = read_encoder_config(folder)
        encoder = cls(
            backbone if backbone is not None else backbone_from_config(config["backbone"]),
            fuser if fuser is not None else fuser_from_config(config["fuser"]),
        )
        load_weights(encoder, folder / WEIGHTS_FILE)
        return encoder.to(device=place, dtype=precision).eval()


def check_fuser_fits(backbone: AnyBackbone, fuser: Fuser) -> None:
    """Refuse a fuser that does not take what the backbone gives: one map of its own width for each tapped layer.

    Raises:
        ValueError: if the fuser was built for another number of layers or other widths, or needs one grid where several
            backbones have several; the message says what to do.
    """
    widths = backbone.map_channels
    if tuple(fuser.in_channels) != widths:
        raise InputError(
            f"fuser {fuser.name!r} was built for {len(fuser.in_channels)} maps of widths {tuple(fuser.in_channels)}, "
            f"but the backbone taps layers {backbone.layers} of widths {widths}; build the fuser with "
            f"in_channels={backbone.fuser_channels} and num_layers={len(widths)}, or tap other layers."
        )
    grids = backbone.grids()
    if fuser.equal_grids and len(set(grids)) > 1:
        given = ", ".join(f"{height}x{width}" for height, width in grids)
        raise InputError(
            f"fuser {fuser.name!r} needs one grid for all maps, and layers {backbone.layers} have {given}; tap layers "
            "of one grid, or bring them to one with resample='bilinear', which models take that are given in a list."
        )


def _inside(module: nn.Module) -> Any:
    """Return the backbone or fuser inside the wrappers of torch.compile and data parallelism."""
    while not isinstance(module, (AnyBackbone, Fuser)):
        inner = next((module._modules[name] for name in ("_orig_mod", "module") if name in module._modules), None)
        assert inner is not None, type(module)
        module = inner
    return module


def create_encoder(
    model: object,
    held: object = None,
    *,
    layers: LayerChoice | Sequence[LayerChoice] | None = None,
    fuser: str | Fuser = "mmfuser",
    fuser_options: Mapping[str, Any] | None = None,
    backbone_options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    pretrained: bool | Sequence[bool] = True,
    image_size: int | tuple[int, int] | list[int | tuple[int, int] | None] | None = None,
    copy: bool | Sequence[bool] = False,
    resample: str | None = "bilinear",
    grid: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    options: Mapping[str, Any] | None = None,
) -> FusedEncoder:
    """Build a backbone from a name, a config or a model that you hold, tap its layers and put a fuser behind it.

    A model that is handed over is cut after the deepest tapped layer, and used from then on by the encoder; with
    ``copy=True`` its vision model is copied first and it stays as it is.

    Args:
        model: as in `create_backbone`: ``"timm:vit_large_patch14_clip_quickgelu_336.openai"``,
            ``"open_clip:ViT-L-14/openai"``, ``"transformers:org/name"``, ``"transformers:" + folder``, a config of
            transformers, a model, or a family with the model second. A list of these makes one encoder of several
            backbones, which all see the picture; see `create_backbone_group`.
        held: a model or config where ``model`` names the family that it is to be taken for.
        layers: layer numbers (0 = embeddings, -2 = penultimate block), shares of the depth (floats in (0, 1]), or
            `layerfuse.spread`, in the order that the fuser wants; if None, the fuser's published choice for this depth.
            Of several backbones a list with a choice for each; the four arguments before ``resample`` are one value for
            all, or a list.
        fuser: its name, or the fuser itself.
        fuser_options: the fuser's own arguments, such as ``{"num_heads": 8}``.
        backbone_options: of a name, arguments for the library's own constructor; of a model, for the backbone's.
        pretrained: of a name, load the library's weights; False gives random weights and downloads nothing.
        image_size: edge or (height, width) in pixels, if not the model's own.
        copy: copy a model that is handed over rather than cut it.
        resample: how maps of several backbones come to one grid: ``"bilinear"``, ``"bicubic"``, ``"nearest"``, or None
            where the fuser takes each on its own.
        grid: (H, W) of that grid, in patches; if None, that of the first backbone.
        device: where the encoder goes, if not where its backbone is built.
        dtype: of all weights, such as torch.bfloat16 or its name, if not the library's.
        options: deprecated name of ``backbone_options``.

    Returns:
        The encoder in evaluation mode; ``encoder(images)`` gives (B, N, C_out).

    Raises:
        ValueError: if a name is unknown, a layer is out of range or repeated, an option does not exist, or the fuser
            does not fit the layers.
        TypeError: if ``model`` is neither a name nor a model nor a config, or ``fuser`` neither a name nor a fuser.
    """
    if isinstance(model, (list, tuple)) and held is not None:
        raise InvalidTypeError("several backbones are one list; write the family of each in front of its name.")
    model, held = named_once("create_encoder", model, held)
    if options is not None:
        warnings.warn("options is deprecated; write backbone_options.", DeprecationWarning, stacklevel=2)
        backbone_options = options
    if not isinstance(fuser, (str, Fuser)):
        raise InvalidTypeError(f"fuser is a {type(fuser).__name__}; give its name, or a Fuser that is built.")
    if isinstance(fuser, Fuser) and fuser_options:
        raise InputError("fuser_options are for a fuser that is built by its name; this one is built already.")
    chosen = fuser.options if isinstance(fuser, Fuser) else {} if fuser_options is None else fuser_options
    # Before the backbone, which may have to be downloaded, and whose layers are the fuser's choice.
    kind = type(fuser) if isinstance(fuser, Fuser) else fuser_class_for(fuser, chosen)
    wanted: Any = partial(_published_layers, kind, chosen) if layers is None else layers
    how: dict[str, Any] = {"pretrained": pretrained, "image_size": image_size, "options": backbone_options}
    backbone: AnyBackbone
    if isinstance(model, (list, tuple)):
        backbone = create_backbone_group(model, layers=wanted, copy=copy, resample=resample, grid=grid, **how)
    else:
        if grid is not None:
            shown = tuple(grid) if isinstance(grid, Sequence) else grid
            raise InputError(f"grid={shown} is for several backbones; one backbone has one grid already.")
        for name, given in (("pretrained", pretrained), ("backbone_options", backbone_options), ("copy", copy)):
            if isinstance(given, (list, tuple)):
                raise InvalidTypeError(
                    f"{name} is a {type(given).__name__}, for several backbones, and one model was given; list that, "
                    f"too, or give {name} alone."
                )
        backbone = create_backbone(model, held, layers=wanted, copy=bool(copy), **how)
    if not isinstance(fuser, Fuser):
        count = len(backbone.layers)
        fuser = create_fuser(fuser, in_channels=backbone.fuser_channels, num_layers=count, options=fuser_options)
    return FusedEncoder(backbone, fuser).to(device=as_device(device), dtype=as_dtype(dtype)).eval()


def _published_layers(fuser: type[Fuser], options: Mapping[str, Any], num_blocks: int) -> tuple[int, ...]:
    published = source_layers(fuser, num_blocks, options)
    if published is None:
        raise InputError(
            f"fuser {fuser.name!r} has no published choice of layers for {num_blocks} blocks; name them, for example "
            "layers=(3, 8, -2) or layers=layerfuse.spread(4)."
        )
    return published
