"""A backbone and a fuser joined: images in, fused visual tokens out.

This is where layerfuse ends; a projector and a language model come after it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors.torch import load_file, save_file
from torch import nn

from layerfuse.backbones import Backbone, backbone_from_config, create_backbone
from layerfuse.errors import InputError, MissingFileError
from layerfuse.fusers import Fuser, FuserCost, create_fuser, fuser_from_config
from layerfuse.preprocessing import Preprocessing

__all__ = ["FusedEncoder", "check_fuser_fits", "create_encoder"]

_CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "model.safetensors"


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
        backbone: taps L layers.
        fuser: takes L maps of the backbone's width.

    Raises:
        ValueError: if the fuser was built for another number of layers or other widths than the backbone gives.
    """

    def __init__(self, backbone: Backbone, fuser: Fuser) -> None:
        super().__init__()
        check_fuser_fits(backbone, fuser)
        self.backbone = backbone
        self.fuser = fuser

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images.

        Args:
            images: (B, 3, height, width) in pixels, normalised as ``preprocessing`` does it.

        Returns:
            (B, N, C_out) fused tokens.

        Raises:
            ValueError: if the backbone cannot take the image size.
        """
        tokens: torch.Tensor = self.fuser(self.backbone(images))
        return tokens

    @property
    def preprocessing(self) -> Preprocessing:
        """How the backbone wants its images prepared."""
        return self.backbone.preprocessing

    @property
    def out_channels(self) -> int:
        """C_out, the width of the fused tokens."""
        return self.fuser.out_channels

    def cost(self, image_size: tuple[int, int] | None = None) -> FuserCost:
        """Tell what the fuser costs, without running it.

        Args:
            image_size: (height, width) in pixels; the backbone's own size if None.

        Returns:
            Parameters, output channels, tokens and FLOPs per image of the fuser.
        """
        height, width = image_size or self.backbone.image_size
        return self.fuser.cost((self.backbone.grid(height, width),) * len(self.backbone.layers))

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able description from which the same architecture is rebuilt."""
        return {"backbone": self.backbone.config, "fuser": self.fuser.config}

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        # Written beside their place and renamed, so that a broken run leaves no half-written file.
        save_file(weights, save_directory / f"{_WEIGHTS_FILE}.part", metadata={"format": "pt"})
        (save_directory / f"{_CONFIG_FILE}.part").write_text(json.dumps(self.config, indent=2) + "\n")
        for name in (_WEIGHTS_FILE, _CONFIG_FILE):
            os.replace(save_directory / f"{name}.part", save_directory / name)

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # named arguments where the mixin takes any
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        backbone: Backbone | dict[str, Any] | None = None,
        fuser: Fuser | dict[str, Any] | None = None,
    ) -> FusedEncoder:
        folder = Path(model_id)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=[_CONFIG_FILE, _WEIGHTS_FILE],
                )
            )
        config = _read_config(folder)
        encoder = cls(
            backbone if isinstance(backbone, Backbone) else backbone_from_config(config["backbone"]),
            fuser if isinstance(fuser, Fuser) else fuser_from_config(config["fuser"]),
        )
        _load_weights(encoder, folder / _WEIGHTS_FILE)
        return encoder.eval()


def check_fuser_fits(backbone: Backbone, fuser: Fuser) -> None:
    """Refuse a fuser that does not take what the backbone gives.

    Args:
        backbone: gives one map of its own width for each tapped layer.
        fuser: what is to stand behind it.

    Raises:
        ValueError: if the fuser was built for another number of layers or other widths; the message says for which to
            build it.
    """
    widths = (backbone.embed_dim,) * len(backbone.layers)
    if tuple(fuser.in_channels) != widths:
        raise InputError(
            f"fuser {fuser.name!r} was built for {len(fuser.in_channels)} maps of widths {tuple(fuser.in_channels)}, "
            f"but the backbone taps layers {backbone.layers} of widths {widths}; build the fuser with "
            f"in_channels={backbone.embed_dim} and num_layers={len(widths)}, or tap other layers."
        )


def _read_config(folder: Path) -> dict[str, Any]:
    missing = [name for name in (_CONFIG_FILE, _WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(
            f"{folder} holds no {' and no '.join(missing)}; give a folder written by FusedEncoder.save_pretrained."
        )
    config: dict[str, Any] = json.loads((folder / _CONFIG_FILE).read_text())
    if set(config) != {"backbone", "fuser"}:
        raise InputError(
            f"{folder / _CONFIG_FILE} has the keys {sorted(config)}; a FusedEncoder's has 'backbone' and 'fuser'."
        )
    return config


def _load_weights(encoder: FusedEncoder, path: Path) -> None:
    mismatch = encoder.load_state_dict(load_file(path), strict=False)
    if mismatch.missing_keys or mismatch.unexpected_keys:
        raise InputError(
            f"the weights in {path} do not fit this encoder. Missing: {mismatch.missing_keys or 'none'}. "
            f"Unexpected: {mismatch.unexpected_keys or 'none'}. Check that config and weights come from the same run."
        )


def create_encoder(
    family: str,
    name: str,
    *,
    layers: int | Sequence[int],
    fuser: str = "mmfuser",
    fuser_options: Mapping[str, Any] | None = None,
    pretrained: bool = True,
    image_size: int | tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> FusedEncoder:
    """Build a backbone by name, tap its layers and put a fuser behind it.

    Args:
        family: backbone family: ``"timm"``, ``"open_clip"``, ``"transformers"``, …
        name: the model's name in that library, or a folder where the family takes one.
        layers: layer numbers in the order the fuser wants them (0 = embeddings, -2 = penultimate block).
        fuser: name of the fuser.
        fuser_options: the fuser's own arguments, such as ``{"num_heads": 8}``.
        pretrained: load the library's pretrained weights; False gives random weights and downloads nothing.
        image_size: pixels, one number or (height, width); the model's own if None.
        options: arguments for the library's own constructor.

    Returns:
        The encoder; ``encoder(images)`` gives (B, N, C_out).

    Raises:
        ValueError: if a name is unknown, a layer is out of range or repeated, or an option does not exist.
    """
    backbone = create_backbone(
        family, name, layers=layers, pretrained=pretrained, image_size=image_size, options=options
    )
    return FusedEncoder(
        backbone,
        create_fuser(fuser, in_channels=backbone.embed_dim, num_layers=len(backbone.layers), options=fuser_options),
    )
