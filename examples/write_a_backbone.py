"""A backbone family in a file of one's own: registered under a name, usable wherever layerfuse's own are.

Import this file, or announce the class in your package's pyproject.toml, and the family is known everywhere:

    [project.entry-points."layerfuse.backbones"]
    my_lab = "my_package.backbones:MyLabBackbone"

docs/write_a_backbone.md goes through it part by part.

Run:
    python examples/write_a_backbone.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layerfuse import BACKBONES, Backbone, BackboneFacts, FusedEncoder, Preprocessing, create_encoder
from layerfuse.errors import InputError
from layerfuse.layers import LayerChoice

SIZES = {"vit-small": {"width": 64, "depth": 6}, "vit-large": {"width": 128, "depth": 12}}


class MyLabViT(nn.Module):
    """A Vision Transformer as somebody wrote it, who has never heard of layerfuse."""

    def __init__(self, *, width: int, depth: int, image_size: int = 64, patch_size: int = 16) -> None:
        super().__init__()
        self.width, self.image_size, self.patch_size = width, image_size, patch_size
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + (image_size // patch_size) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode images (B, 3, height, width) as the class token, (B, C)."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], dim=1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]


@BACKBONES.register("my_lab")
class MyLabBackbone(Backbone):
    """The models of my lab."""

    family = "my_lab"
    library = "my_lab"  # models whose classes are defined in this package are handed over without naming the family

    def __init__(self, model: nn.Module, *, layers: LayerChoice, recipe: Mapping[str, Any] | None = None) -> None:
        vit: Any = model
        size = (vit.image_size, vit.image_size)
        facts = BackboneFacts(
            blocks="blocks",
            embed_dim=vit.width,
            num_prefix_tokens=1,
            patch_size=(vit.patch_size, vit.patch_size),
            image_size=size,
            any_size=False,
            preprocessing=Preprocessing(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            tail=("norm",),
        )
        super().__init__(model, layers=layers, facts=facts, recipe=recipe)

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        layers: LayerChoice,
        pretrained: bool = True,
        image_size: int | tuple[int, int] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> MyLabBackbone:
        """Build one of `SIZES`; ``options`` are arguments of `MyLabViT`."""
        if name not in SIZES:
            raise InputError(f"my lab has no model {name!r}; it has {', '.join(SIZES)}.")
        if pretrained:
            raise InputError("my lab has published no weights yet; pass pretrained=False.")
        arguments = {**SIZES[name], **({} if image_size is None else {"image_size": image_size}), **(options or {})}
        return cls(MyLabViT(**arguments), layers=layers, recipe=arguments)

    @classmethod
    def rebuild(cls, recipe: Mapping[str, Any], *, layers: Sequence[int]) -> MyLabBackbone:
        """Build from the arguments that `from_name` noted."""
        return cls(MyLabViT(**recipe), layers=layers, recipe=recipe)

    @classmethod
    def list_names(cls) -> list[str]:
        """The names in `SIZES`."""
        return list(SIZES)


def main() -> None:
    encoder = create_encoder("my_lab:vit-small", layers=(0.5, -2), fuser="concat", pretrained=False)
    print("layers", encoder.backbone.layers, "tokens", encoder.num_tokens(), "grid", encoder.grid())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = encoder(images)

    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        loaded = FusedEncoder.from_pretrained(folder)
    with torch.no_grad():
        print("same after loading:", torch.equal(tokens, loaded(images)))

    # A model that is at hand; copy=True leaves it as it is.
    model = MyLabViT(width=64, depth=4)
    held = create_encoder("my_lab", model, layers=(1, 2), fuser="average", copy=True)
    print("tapped", held.backbone.layers, "of", len(model.blocks), "blocks")


if __name__ == "__main__":
    main()
