"""Find the recorded fuser blocks and decode them (encodings: the goldens' README, section 1).

Every file found is used, whatever its name, width, grid and batch: in the shared folder (`LAYERFUSE_GOLDENS` or
../shared/goldens) and in the small copy under tests/goldens that every clone has.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers.mmfuser import MMFuser, from_published_state_dict

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("LAYERFUSE_GOLDENS", ROOT.parent / "shared" / "goldens"))
SHIPPED = ROOT / "tests" / "goldens"

# What README section 1 records of every case; a report beside the files overrides it.
DEFAULT_SETTINGS: dict[str, Any] = {"n_heads": 16, "n_points": 4, "layernorm_eps": 1e-6}


def fuser_files(pattern: str) -> list[Path]:
    """Every file of the fuser goldens that fits, shared ones first."""
    return [path for folder in (SHARED, SHIPPED) for path in sorted((folder / "fuser").glob(pattern))]


class FuserCase:
    """One recorded block: inputs, parameters, output and gradients, decoded to float32."""

    def __init__(self, path: Path) -> None:
        self.tensors = load_file(path)
        report = path.parent / "report.json"
        recorded = json.loads(report.read_text())[path.stem] if report.exists() else {}
        self.settings = {**DEFAULT_SETTINGS, **recorded}

    @property
    def output(self) -> torch.Tensor:
        return self.tensors["output"].float()

    @property
    def cotangent(self) -> torch.Tensor:
        return self.tensors["cotangent"].float()

    @property
    def inputs(self) -> torch.Tensor:
        """(L, B, N, C) maps, the query last."""
        if "input" in self.tensors:
            return self.tensors["input"].float()
        return self.tensors["input_int8"].float() * self.tensors["input_scale"]

    @property
    def grid(self) -> Grid:
        """(H, W); square where no report tells."""
        if "grid" in self.settings:
            height, width = self.settings["grid"]
            return height, width
        edge = round(self.output.shape[1] ** 0.5)
        return edge, edge

    def parameters(self) -> dict[str, torch.Tensor]:
        """Parameters under their published names."""
        found = {}
        for key, tensor in self.tensors.items():
            kind, _, name = key.partition(".")
            if kind == "param":
                found[name] = tensor.float()
            elif kind == "param_int8":
                found[name] = tensor.float() * self.tensors[f"scale.{name}"]
            elif kind == "param_toeplitz":
                size = (len(tensor) + 1) // 2
                position = torch.arange(size)
                found[name] = tensor.float()[position[:, None] - position[None, :] + size - 1]
        return found

    def fuser(self, dtype: torch.dtype = torch.float32, *, implementation: str = "auto") -> MMFuser:
        """Our block with the recorded parameters."""
        num_layers, _, _, channels = self.inputs.shape
        fuser = MMFuser(
            channels,
            num_layers,
            num_heads=self.settings["n_heads"],
            num_points=self.settings["n_points"],
            norm_eps=self.settings["layernorm_eps"],
            implementation=implementation,
        )
        fuser.load_state_dict(from_published_state_dict(self.parameters()))
        return fuser.to(dtype)

    def features(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, FeatureMaps]:
        """The stacked inputs as a leaf that collects gradients, and the maps cut from it."""
        stack = self.inputs.to(dtype, copy=True).requires_grad_()
        count = len(stack)
        maps = FeatureMaps(maps=tuple(stack), layers=tuple(range(1, count + 1)), grids=(self.grid,) * count)
        return stack, maps

    def expected_input_gradients(self) -> dict[str, torch.Tensor]:
        return {
            key: tensor for key, tensor in self.tensors.items() if key.startswith(("grad.input", "grad_dot_channels."))
        }

    def expected_parameter_gradients(self) -> dict[str, torch.Tensor]:
        kinds = ("grad.param.", "grad_dot_in.", "grad_dot_out.", "grad_rows.", "grad_norm.")
        return {key: tensor for key, tensor in self.tensors.items() if key.startswith(kinds)}

    def input_gradient(self, key: str, gradient: torch.Tensor) -> torch.Tensor:
        """Bring the gradient of the stacked inputs (L, B, N, C) into the form a key records."""
        if key == "grad_dot_channels.input":
            return gradient @ self.tensors["probe_channels.input"].to(gradient.dtype)
        _, _, index = key.partition("_")
        return gradient[int(index)] if index else gradient

    def parameter_gradient(self, key: str, gradient: torch.Tensor) -> torch.Tensor:
        """Bring a parameter's gradient into the form a key records."""
        kind, name = _split(key)
        # torch's float32 norm of a million numbers is off by 6e-5 here, which would hide the gradient's own error.
        gradient = gradient.double()
        if kind == "grad_dot_in":
            return gradient @ self.tensors[f"probe_in.{name}"].to(gradient.dtype)
        if kind == "grad_dot_out":
            return self.tensors[f"probe_out.{name}"].to(gradient.dtype) @ gradient
        if kind == "grad_rows":
            return gradient[self.tensors[f"grad_rows_idx.{name}"]]
        if kind == "grad_norm":
            return gradient.norm().reshape(1)
        return gradient


def parameter_of(key: str) -> str:
    """The published parameter name inside a gradient's key."""
    return _split(key)[1]


def _split(key: str) -> tuple[str, str]:
    for kind in ("grad.param", "grad_dot_in", "grad_dot_out", "grad_rows", "grad_norm"):
        if key.startswith(f"{kind}."):
            return kind, key.removeprefix(f"{kind}.")
    raise AssertionError(f"{key} is no gradient of a parameter")


def published_gradients(fuser: MMFuser) -> dict[str, torch.Tensor]:
    """Gradients of our parameters under the published names."""
    names = from_published_names(fuser)
    gradients = {name: parameter.grad for name, parameter in fuser.named_parameters()}
    return {published: gradients[ours] for published, ours in names.items()}  # type: ignore[misc]


def from_published_names(fuser: MMFuser) -> dict[str, str]:
    """Published name → our name, read off the conversion itself."""
    swap = {"output_scale.scale": "gamma1", "self_scale.scale": "gamma2"}
    return {swap.get(name, name): name for name, _ in fuser.named_parameters()}
