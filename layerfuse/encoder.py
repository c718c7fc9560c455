"""A backbone and a fuser joined: images in, fused visual tokens out.

This is where layerfuse ends; a projector and a language model come after it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import nn

from layerfuse.backbones import Backbone, backbone_from_config, create_backbone
from layerfuse.errors import InputError, MissingFileError
from layerfuse.files import atomic_folder, explain_missing_config
from layerfuse.fusers import Fuser, FuserCost, create_fuser, fuser_from_config
from layerfuse.preprocessing import Preprocessing
from layerfuse.weights import fitting_weights, load_weights, save_weights

__all__ = ["FusedEncoder", "check_fuser_fits", "create_encoder"]

_CONFIG_FILE = "config.json"
_WEIGHTS_FILE = "model.safetensors"
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

        Whatever stops it, the folder holds the earlier model, this one, or nothing that loads.

        Args:
            save_directory: made if need be; an encoder in it is replaced.
            config: what `push_to_hub` of huggingface_hub hands over; the encoder's own is written.
            repo_id: on the hub, if it goes there; the folder's name if None.
            push_to_hub: whether it goes to the hub, too.
            model_card_kwargs: for the card's template.
            commit_message: this and what follows are for the hub, as in `push_to_hub`.
            private: likewise.
            token: likewise.
            branch: likewise.
            create_pr: likewise.
            allow_patterns: likewise.
            ignore_patterns: likewise.
            delete_patterns: likewise.

        Returns:
            The address of the commit if it went to the hub.

        Raises:
            ValueError: before anything is written, if a weight is none of those that the config describes (adapters,
                changed modules); the message lists them.
            OSError: if the folder cannot be written to; an earlier model stays.
        """
        folder = Path(save_directory)
        described = self.config
        weights = fitting_weights(self, lambda: _from_config(described))
        with atomic_folder(folder) as scratch:
            save_weights(self, weights, scratch / _WEIGHTS_FILE)
            (scratch / _CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
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
        backbone: Backbone | None = None,
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
        """Load an encoder that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the hub.
            backbone: takes the weights instead of one that is built from the config.
            fuser: likewise.
            dtype: of all weights, such as torch.bfloat16 or its name; None or "auto" keeps what was saved.
            device: where the encoder goes; the CPU if None.
            device_map: as `device`, in transformers' words: one device for all, also as ``{"": device}``.
            force_download: this and what follows are for the hub, as in `snapshot_download`.
            token: likewise.
            cache_dir: likewise.
            local_files_only: likewise.
            revision: likewise.

        Returns:
            The encoder, in evaluation mode.

        Raises:
            FileNotFoundError: if there is no such encoder.
            ValueError: if config or weights are damaged or do not fit one another, or dtype or device is none.
        """
        precision, place = _as_dtype(dtype), _as_device(device, device_map)
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = _download(
                str(pretrained_model_name_or_path),
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        config = _read_config(folder)
        encoder = cls(
            backbone if backbone is not None else backbone_from_config(config["backbone"]),
            fuser if fuser is not None else fuser_from_config(config["fuser"]),
        )
        load_weights(encoder, folder / _WEIGHTS_FILE)
        return encoder.to(device=place, dtype=precision).eval()


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


def _from_config(config: Mapping[str, Any]) -> FusedEncoder:
    return FusedEncoder(backbone_from_config(config["backbone"]), fuser_from_config(config["fuser"]))


def _inside(module: nn.Module) -> Any:
    """Look through what torch.compile and data parallelism put around a module."""
    while not isinstance(module, (Backbone, Fuser)):
        inner = next((module._modules[name] for name in ("_orig_mod", "module") if name in module._modules), None)
        assert inner is not None, type(module)
        module = inner
    return module


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found is None or found == "auto":
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise InputError(f"dtype {dtype!r} is no floating dtype of torch; give torch.bfloat16, 'float16', … or None.")
    return found


def _as_device(
    device: torch.device | str | None, device_map: Mapping[str, Any] | torch.device | str | None
) -> torch.device | None:
    if device is not None and device_map is not None:
        raise InputError("device and device_map say the same; give one of them.")
    place = device if device is not None else device_map
    if isinstance(place, Mapping):
        if set(place) != {""}:
            raise InputError(f"device_map {dict(place)} splits the encoder, which lies on one device; give device=….")
        place = place[""]
    if place is None:
        return None
    try:
        return torch.device(place)
    except RuntimeError as error:
        raise InputError(
            f"{place!r} is no device of torch; an encoder lies on one: give 'cpu', 'cuda', 'cuda:1', 'mps', …"
        ) from error


def _download(
    name: str,
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    force_download: bool,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    try:
        found = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=[_CONFIG_FILE, _WEIGHTS_FILE],
        )
    except (OSError, ValueError) as error:  # no such name, no network, nothing in the cache
        raise MissingFileError(
            f"{name} is no folder, and it could not be fetched from the hub; give a folder written by "
            f"FusedEncoder.save_pretrained, or the name of a repository. huggingface_hub says: {error}"
        ) from error
    return Path(found)


def _read_config(folder: Path) -> dict[str, Any]:
    missing = [name for name in (_CONFIG_FILE, _WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(
            f"{folder} holds no {' and no '.join(missing)}; give a folder written by FusedEncoder.save_pretrained."
            f"{explain_missing_config(folder)}"
        )
    try:
        config = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / _CONFIG_FILE} is no valid JSON ({error}); write or download it anew.") from error
    if not isinstance(config, dict) or set(config) != {"backbone", "fuser"}:
        keys = sorted(config) if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{folder / _CONFIG_FILE} has the keys {keys}; a FusedEncoder's has 'backbone' and 'fuser'.")
    return config


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
