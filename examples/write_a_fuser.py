"""A fuser in a file of one's own: registered under a name, usable wherever layerfuse's own are.

Import this file, or announce the class in your package's pyproject.toml, and the name is known everywhere:

    [project.entry-points."layerfuse.fusers"]
    gated_sum = "my_package.gated_sum:GatedSum"

Run:
    python examples/write_a_fuser.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
from torch import nn

from layerfuse import FUSERS, FeatureMaps, FusedEncoder, Fuser, create_encoder
from layerfuse.features import Grid


@FUSERS.register("gated_sum")
class GatedSum(Fuser):
    """The last map, plus each other map times a gate that every token computes for itself.

    Args:
        in_channels: C of every map.
        num_layers: number of maps L, at least 2.
        bias: where the gates start, before the sigmoid; -4 nearly closes them.
    """

    equal_channels = True

    def __init__(self, in_channels: int | Sequence[int], num_layers: int, *, bias: float = -4.0) -> None:
        super().__init__(in_channels, num_layers)
        self.gates = nn.Linear(self.in_channels[-1], num_layers - 1)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start with gates that are nearly closed; a fuser that was built on the meta device starts here, too."""
        super().reset_parameters()
        nn.init.constant_(self.gates.bias, self.options["bias"])

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Add the gated maps: (B, N, C)."""
        *others, last = features.maps
        gates = self.gates(last).sigmoid()
        return last + (torch.stack(others, dim=-1) * gates[:, :, None, :]).sum(-1)

    def extra_flops(self, grids: Sequence[Grid]) -> int:
        """Those of the weighted sum; torch counts those of the gates."""
        return 2 * self.num_tokens(grids) * self.in_channels[-1] * (self.num_layers - 1)


def main() -> None:
    encoder = create_encoder(
        "timm:vit_tiny_patch16_224",
        layers=(3, 6, -2),
        fuser="gated_sum",
        fuser_options={"bias": -2.0},
        pretrained=False,
    )
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        tokens = encoder(images)
    print("tokens", tuple(tokens.shape), encoder.cost())

    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        loaded = FusedEncoder.from_pretrained(folder)
    with torch.no_grad():
        print("same after loading:", torch.equal(tokens, loaded(images)))


if __name__ == "__main__":
    main()
