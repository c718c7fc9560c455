"""What is tried on each backbone: one function a column."""

from __future__ import annotations

import copy
import warnings
from functools import cached_property

import torch

from layerfuse import FusedEncoder
from layerfuse.backbones import Backbone, create_backbone
from layerfuse.errors import InputError
from layerfuse.fusers import create_fuser
from layerfuse.testing import random_images, randomise_parameters
from tools.model_table.backbones import BackboneRow
from tools.model_table.building import backbone_of, hidden_states_of, library_model, published_backbone
from tools.model_table.cells import YES, DifferenceError, TrialColumn

__all__ = ["BACKBONE_COLUMNS", "BackboneTrial", "check_close", "run_onnx"]

_SMALL = 8  # patches along an edge of the images that all but the taps are tried with
_CHANNELS = 4
_ANY, _BUILT = "any", "built"


class BackboneTrial:
    """The models of one row, each built when a column first asks for it."""

    def __init__(self, row: BackboneRow) -> None:
        self.row = row

    @cached_property
    def published(self) -> Backbone:
        """The whole architecture, on the meta device."""
        return published_backbone(self.row)

    @cached_property
    def native(self) -> tuple[Backbone, list[torch.Tensor], list[torch.Tensor]]:
        """A backbone of the model's own size, its hidden states at the tapped layers, and the library's."""
        model = library_model(self.row)
        backbone = create_backbone(model, layers=self.row.tapped, copy=True)
        images = random_images(1, size=backbone.image_size)
        with torch.no_grad():
            expected = hidden_states_of(self.row, model, images)
            features = backbone(images)
        tokens = list(features.maps)
        if features.prefix:
            tokens = [torch.cat(pair, dim=1) for pair in zip(features.prefix, tokens, strict=True)]
        return backbone, tokens, [expected[layer] for layer in self.row.tapped]

    @cached_property
    def small(self) -> Backbone:
        """A backbone built for few patches, or for its own size if it takes no other."""
        try:
            return backbone_of(self.row, image_size=self.size(_SMALL, _SMALL))
        except InputError:
            return backbone_of(self.row)

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        """Return height and width, in pixels, of so many patches; of hierarchical models, half as many large cells."""
        native, (coarse, _) = self.published.image_size, self.published.grids()[-1]
        edge = native[0] // coarse
        if edge > self.published.patch_size[0]:
            rows, columns = rows // 2, columns // 2
        return rows * edge, columns * edge

    @property
    def images(self) -> torch.Tensor:
        """Two images that the small backbone takes."""
        return random_images(2, size=self.small.image_size)

    def encoder(self) -> FusedEncoder:
        """Return an encoder of its own: the small backbone, and MMFuser."""
        backbone = copy.deepcopy(self.small)
        one_width = len(set(backbone.map_channels)) == 1
        name, options = ("mmfuser", {}) if one_width else ("concat", {"resize": "bilinear", "out_channels": 64})
        fuser = create_fuser(
            name, in_channels=backbone.fuser_channels, num_layers=len(backbone.layers), options=options
        )
        randomise_parameters(fuser, std=0.02)
        return FusedEncoder(backbone, fuser).eval()


def check_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Refuse numbers that are not finite, or off by more than a share of the largest."""
    worst = (actual.float() - expected.float()).abs().max().item() / expected.float().abs().max().item()
    if not worst <= tolerance:
        raise DifferenceError(f"off by up to {worst:.1g} of the largest number")


def run_onnx(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return what onnxruntime computes from a model that torch exported to ONNX."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert program is not None
    written = program.model_proto.SerializeToString()
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(written, settings, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return torch.from_numpy(session.run(None, dict(zip(names, (each.numpy() for each in inputs), strict=True)))[0])


def _blocks(trial: BackboneTrial) -> str:
    widths = dict.fromkeys(trial.published.map_channels)
    return f"{trial.published.num_blocks} × {'–'.join(map(str, widths))}"


def _width(trial: BackboneTrial) -> str:
    tried = trial.small.embed_dim
    return "full" if tried == trial.published.embed_dim else str(tried)


def _patch(trial: BackboneTrial) -> str:
    return str(trial.published.patch_size[0])


def _pixels(trial: BackboneTrial) -> str:
    return "×".join(map(str, sorted({*trial.published.image_size})))


def _grid(trial: BackboneTrial) -> str:
    return "×".join(map(str, trial.native[0].grids()[-1]))


def _prefix(trial: BackboneTrial) -> str:
    backbone, _, expected = trial.native
    rows, columns = backbone.grids()[0]
    return str(expected[0].shape[1] - rows * columns)


def _taps(trial: BackboneTrial) -> str:
    _, tokens, expected = trial.native
    for layer, ours, theirs in zip(trial.row.tapped, tokens, expected, strict=True):
        if ours.shape != theirs.shape or not torch.equal(ours, theirs):
            raise DifferenceError(f"layer {layer} is not what the library gives")
    return YES


def _run_size(backbone: Backbone, size: tuple[int, int]) -> None:
    """Run a backbone on images of a size and check what comes out."""
    with torch.no_grad():
        features = backbone(random_images(1, size=size))
    if features.grids != backbone.grids(size) or not all(each.isfinite().all() for each in features):
        raise DifferenceError(f"maps of grids {features.grids} came of images of {size} pixels")


def _other_size(trial: BackboneTrial, size: tuple[int, int]) -> str:
    try:
        _run_size(trial.small, size)
    except InputError:
        _run_size(backbone_of(trial.row, image_size=size), size)
        return _BUILT
    return _ANY


def _square(trial: BackboneTrial) -> str:
    return _other_size(trial, trial.size(_SMALL + 2, _SMALL + 2))


def _not_square(trial: BackboneTrial) -> str:
    return _other_size(trial, trial.size(_SMALL - 2, _SMALL + 2))


def _compile(trial: BackboneTrial) -> str:
    torch._dynamo.reset()
    encoder, images = trial.encoder(), trial.images
    with torch.no_grad():
        check_close(torch.compile(encoder, fullgraph=True, backend="aot_eager")(images), encoder(images), 1e-4)
    return YES


def _export(trial: BackboneTrial) -> str:
    encoder, images = trial.encoder(), trial.images
    with torch.no_grad():
        check_close(torch.export.export(encoder, (images,)).module()(images), encoder(images), 1e-4)
    return YES


def _onnx(trial: BackboneTrial) -> str:
    encoder, images = trial.encoder(), trial.images
    with torch.no_grad():
        expected = encoder(images)
        actual = run_onnx(encoder, (images,))
    check_close(actual, expected, 1e-4)
    return YES


def _half(trial: BackboneTrial) -> str:
    encoder, images = trial.encoder(), trial.images
    with torch.no_grad():
        expected = encoder(images)
        for dtype in (torch.bfloat16, torch.float16):
            actual = encoder.to(dtype)(images)
            if actual.dtype != dtype:
                raise DifferenceError(f"tokens of {actual.dtype} came of an encoder in {dtype}")
            check_close(actual, expected, 0.1)
    return YES


def _gradients(trial: BackboneTrial) -> str:
    encoder, images = trial.encoder(), trial.images
    encoder(images).square().mean().backward()
    missing = [name for name, each in encoder.named_parameters() if each.grad is None]
    if missing:
        raise DifferenceError(f"no gradient reaches {', '.join(missing)}")
    encoder.zero_grad()
    encoder.freeze_backbone().train()
    encoder(images).square().mean().backward()
    if any(each.grad is not None for each in encoder.backbone.parameters()):
        raise DifferenceError("a frozen backbone got a gradient")
    if any(each.grad is None for each in encoder.fuser.parameters()):
        raise DifferenceError("a fuser behind a frozen backbone got no gradient")
    return YES


def _channels(trial: BackboneTrial) -> str:
    backbone = backbone_of(trial.row, channels=_CHANNELS)
    images = torch.cat([random_images(1, size=backbone.image_size), random_images(1, size=backbone.image_size)], 1)
    with torch.no_grad():
        features = backbone(images[:, :_CHANNELS])
    if not all(each.isfinite().all() for each in features):
        raise DifferenceError(f"maps of {_CHANNELS} channels are not finite")
    return YES


BACKBONE_COLUMNS: dict[str, TrialColumn] = {
    "blocks": TrialColumn(_blocks, ("published",)),
    "width": TrialColumn(_width, ("published", "small")),
    "patch": TrialColumn(_patch, ("published",)),
    "pixels": TrialColumn(_pixels, ("published",)),
    "grid": TrialColumn(_grid, ("native",)),
    "prefix": TrialColumn(_prefix, ("native",)),
    "taps": TrialColumn(_taps, ("native",)),
    "size": TrialColumn(_square, ("small",)),
    "non-square": TrialColumn(_not_square, ("small",)),
    "compile": TrialColumn(_compile, ("small",)),
    "export": TrialColumn(_export, ("small",)),
    "ONNX": TrialColumn(_onnx, ("small",)),
    "half": TrialColumn(_half, ("small",)),
    "gradients": TrialColumn(_gradients, ("small",)),
    "channels": TrialColumn(_channels, ()),
}
