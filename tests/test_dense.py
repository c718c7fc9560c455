"""Encoders as libraries for segmentation and detection want them, in these libraries."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder
from torchvision.models.detection import FasterRCNN, RetinaNet

from layerfuse import Backbone, FusedEncoder, create_fuser
from layerfuse.dense import DetectionBackbone, SegmentationEncoder, ViTEncoder
from layerfuse.testing import random_images, tiny_backbone


def backbone() -> Backbone:
    return tiny_backbone(layers=(0, 1, 2, 3), image_size=64, patch_size=16).train()


def fused() -> FusedEncoder:
    return FusedEncoder(backbone(), create_fuser("average", in_channels=32, num_layers=4)).train()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name under which segmentation_models_pytorch finds a fused encoder."""
    entry = {"encoder": SegmentationEncoder, "pretrained_settings": {}, "params": {"encoder": fused(), "width": 16}}
    monkeypatch.setitem(smp.encoders.encoders, "ours", entry)
    return "ours"


@pytest.mark.parametrize(
    "name", ["Unet", "UnetPlusPlus", "FPN", "Linknet", "PSPNet", "DeepLabV3Plus", "UPerNet", "Segformer"]
)
def test_models_of_segmentation_models_pytorch_train_one_step_on_our_encoder(name: str, registered: str) -> None:
    model = getattr(smp, name)(registered, encoder_weights=None, classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = random_images(2, size=64), torch.randint(3, (2, 64, 64))
    logits = model(images)
    assert logits.shape == (2, 3, 64, 64)
    before = [weight.clone() for weight in model.encoder.levels.encoder.parameters()]
    torch.nn.functional.cross_entropy(logits, labels).backward()
    optimizer.step()
    after = model.encoder.levels.encoder.parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("width", [16, None])
@pytest.mark.parametrize(("depth", "output_stride"), [(5, 32), (5, 16), (4, 32), (3, 8), (2, 32)])
def test_a_segmentation_encoder_keeps_what_it_promises(depth: int, output_stride: int, width: int | None) -> None:
    encoder = SegmentationEncoder(fused(), depth=depth, output_stride=output_stride, width=width)
    images = random_images(2, size=64)
    maps = encoder(images)
    strides = [min(2**level, output_stride) for level in range(depth + 1)]
    assert [level.shape[1] for level in maps] == encoder.out_channels
    assert encoder.out_channels == [3, 0, *[width or 32] * (depth - 1)]
    assert [tuple(level.shape[2:]) for level in maps] == [(64 // stride, 64 // stride) for stride in strides]
    assert encoder.output_stride == strides[-1]


def test_each_model_has_an_encoder_of_its_own(registered: str) -> None:
    one, other = (smp.Unet(registered, encoder_weights=None) for _ in range(2))
    shared = {id(weight) for weight in one.parameters()} & {id(weight) for weight in other.parameters()}
    assert not shared


def test_a_segmentation_encoder_says_what_it_cannot_be(registered: str) -> None:
    with pytest.raises(ValueError, match="takes 3; give in_channels=3, or build the backbone for others"):
        smp.Unet(registered, encoder_weights=None, in_channels=4)
    with pytest.raises(ValueError, match="depth is 6; a SegmentationEncoder has maps"):
        SegmentationEncoder(fused(), depth=6)


@pytest.mark.parametrize("readout", ["cat", "add", "ignore"])
def test_the_decoder_of_dpt_reads_tapped_maps_and_their_prefix_tokens(readout: str) -> None:
    encoder = ViTEncoder(backbone())
    decoder = DPTDecoder(
        encoder.out_channels,
        encoder.output_strides,
        encoder.has_prefix_tokens,
        readout,
        (8, 8, 8, 8),
        fusion_channels=8,
    )
    decoded = decoder(*encoder(random_images(2, size=64)))
    assert decoded.shape == (2, 8, 32, 32)
    decoded.square().sum().backward()
    assert encoder.backbone.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_dpt_takes_square_patches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = backbone()
    monkeypatch.setattr(type(odd), "strides", ((16, 8),) * len(odd.layers))
    with pytest.raises(ValueError, match="patches are 16x8 pixels, and DPT's decoder knows square ones only"):
        ViTEncoder(odd)


def test_a_faster_rcnn_on_our_pyramid_trains_one_step_with_torchvisions_own_anchors() -> None:
    encoder = fused()
    encoder.freeze_backbone()
    ours = DetectionBackbone(encoder, 16)
    detector = FasterRCNN(ours, num_classes=2, fixed_size=(64, 64), size_divisible=1).train()
    pictures = [torch.rand(3, 80, 60), torch.rand(3, 64, 64)]
    boxes = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0]]), "labels": torch.tensor([1])}
    losses = detector(pictures, [boxes, boxes])
    sum(losses.values()).backward()
    assert all(weight.grad is not None for weight in ours.levels.pyramid.project.parameters())
    assert all(weight.grad is None for weight in encoder.backbone.parameters())
    found = detector.eval()(pictures)
    assert [{*each} for each in found] == [{"boxes", "labels", "scores"}] * 2


def test_a_detection_backbone_names_its_maps_as_torchvision_does() -> None:
    maps = DetectionBackbone(backbone(), 16)(random_images(1, size=64))
    assert {name: tuple(level.shape[1:]) for name, level in maps.items()} == {
        "0": (16, 16, 16),
        "1": (16, 8, 8),
        "2": (16, 4, 4),
        "3": (16, 2, 2),
        "pool": (16, 1, 1),
    }
    torch.testing.assert_close(maps["pool"], maps["3"][:, :, ::2, ::2])


def test_other_detectors_of_torchvision_run_too() -> None:
    retina = RetinaNet(DetectionBackbone(backbone(), 16), num_classes=2, fixed_size=(64, 64), size_divisible=1).eval()
    with torch.no_grad():
        assert {*retina([torch.rand(3, 64, 64)])[0]} == {"boxes", "labels", "scores"}
