"""Feature maps in one call."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from PIL import Image

from layerfuse import FeatureMaps, create_backbone, extract_features
from layerfuse.testing import TinyViT, random_images, randomise_parameters

SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8}
PICTURE = Image.radial_gradient("L").convert("RGB")


def test_a_name_is_built_and_run_on_pictures() -> None:
    torch.manual_seed(3)
    features = extract_features(
        "timm:vit_tiny_patch16_224", PICTURE, layers=(0.5, -1), pretrained=False, image_size=48, options=SMALL
    )
    torch.manual_seed(3)
    backbone = create_backbone(
        "timm:vit_tiny_patch16_224", layers=(2, 3), pretrained=False, image_size=48, options=SMALL
    )
    with torch.no_grad():
        expected = backbone(backbone.prepare(PICTURE))
    assert isinstance(features, FeatureMaps)
    assert (features.layers, features.grids) == ((2, 3), ((6, 6), (6, 6)))
    torch.testing.assert_close(features.maps, expected.maps, rtol=0, atol=0)


def test_a_model_that_is_handed_over_stays_as_it_is_and_no_weight_is_copied() -> None:
    model = randomise_parameters(timm.create_model("vit_tiny_patch16_224", pretrained=False, **SMALL), std=0.1).train()
    images = random_images()
    before, whole = model.eval()(images), list(model.state_dict())
    model.train()
    allocated: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        """Note what is copied."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.Tensor.__deepcopy__, torch.Tensor.clone):
                allocated.append(args[0].numel())
            return function(*args, **(kwargs or {}))

    with Watch():
        features = extract_features(model, images, layers=(1, 2))
    assert not allocated
    assert list(model.state_dict()) == whole
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())
    torch.testing.assert_close(model.eval()(images), before, rtol=0, atol=0)
    expected = create_backbone(model, layers=(1, 2))(images)
    torch.testing.assert_close(features.maps, expected.maps, rtol=0, atol=0)
    assert not features.maps[0].requires_grad


def test_what_is_neither_model_nor_picture_is_refused() -> None:
    facts = {"embed_dim": 32, "num_prefix_tokens": 1, "patch_size": 8, "image_size": 32}
    with pytest.raises(TypeError, match="images are a str"):
        extract_features(TinyViT(), "cat.jpg", layers=1, options=facts)
    with pytest.raises(TypeError, match="made from a name such as"):
        extract_features(None, PICTURE, layers=1)
    with pytest.raises(ValueError, match=r"expected \(B, 3, height, width\)"):
        extract_features(TinyViT(), torch.zeros(3, 32, 32), layers=1, options=facts)
