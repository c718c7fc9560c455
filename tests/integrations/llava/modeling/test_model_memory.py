"""What building and loading a model allocate: no weights that are read or thrown away afterwards."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoTokenizer

from integrations.llava.checkpoints import model_source
from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.config.schema import STAGES, Recipe
from integrations.llava.modeling import model as model_module
from integrations.llava.modeling.build import assemble, build_model
from integrations.llava.modeling.model import FusedLlavaForConditionalGeneration
from integrations.llava.training.plan import Plan
from integrations.llava.training.run_folder import RunFolder
from integrations.llava.training.signals import StopRequest
from integrations.llava.training.start import check_start
from layerfuse.backbones import MODULES, Backbone, create_backbone
from layerfuse.fusers import create_fuser
from layerfuse.testing import random_images
from tests.integrations.llava.tiny_parts import tiny_llm

TINY_VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2}
TINY_TOWER = {"width": 32, "layers": 4, "head_width": 16}
NAMES = {
    "timm:vit_base_patch16_clip_quickgelu_224": TINY_VIT,
    "timm:eva02_base_patch14_224": TINY_VIT,
    "timm:naflexvit_base_patch16_gap": TINY_VIT,
    "open_clip:ViT-B-16": TINY_TOWER,
    "transformers:clip_vision_model": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
    "transformers:dinov2": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
}
# Libraries draw class tokens and position tables, and open_clip its projection, before these are parameters, which
# nothing can keep them from.
DRAWN = ("embed", "token", "embedding")
PROJECTION = torch.Size([32, 512])


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> FusedLlavaForConditionalGeneration:
    torch.manual_seed(0)
    backbone = create_backbone(request.param, layers=(1, 3), pretrained=False, options=NAMES[request.param])
    fuser = create_fuser("average", in_channels=backbone.embed_dim, num_layers=2)
    return build_model(backbone, fuser, tiny_llm(49), image_token_id=49).eval()


class _Draws(TorchDispatchMode):
    """Counts the numbers that are drawn on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(result, torch.Tensor) and not result.is_meta:
            self.shapes.append(result.shape)
        return result


def test_loading_builds_no_random_backbone(
    model: FusedLlavaForConditionalGeneration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path)
    draws, real, most, built, watched = _Draws(), list[weakref.ref[nn.Parameter]](), [0], [], [False]

    def note(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if watched[0] and not parameter.is_meta:
            real.append(weakref.ref(parameter))
        most[0] = max(most[0], sum(each() is not None for each in real))

    def build(config: dict[str, Any]) -> Backbone:
        watched[0] = True
        with draws:
            built.append(model_backbone(config))
        watched[0] = False
        assert {parameter.device.type for parameter in built[0].parameters()} == {"meta"}
        return built[0]

    model_backbone = model_module.backbone_from_config
    monkeypatch.setattr(model_module, "backbone_from_config", build)
    # Hooks run in order: this one sees weights before the model's own takes them away.
    hook = register_module_parameter_registration_hook(note)
    try:
        loaded = load_model(tmp_path)
    finally:
        hook.remove()

    assert len(built) == 1 and real, "the hook saw nothing"
    assert most[0] == 1, "more than the weight that is just registered was in memory"
    tables = {weight.shape for name, weight in model.named_parameters() if any(word in name for word in DRAWN)}
    assert {*draws.shapes} <= {*tables, PROJECTION, torch.Size([32])}
    pixels = random_images(1, size=tuple(model.config.vision_config.image_size or ()))
    with torch.no_grad():
        expected = model.get_image_features(pixels).last_hidden_state
        assert torch.equal(loaded.get_image_features(pixels).last_hidden_state, expected)


def test_building_on_a_device_leaves_every_parameter_and_buffer_there(
    model: FusedLlavaForConditionalGeneration,
) -> None:
    with torch.device("meta"):
        empty = FusedLlavaForConditionalGeneration(model.config)
    places = {name: tensor.device.type for name, tensor in (*empty.named_parameters(), *empty.named_buffers())}
    assert {name for name, place in places.items() if place != "meta"} == set()


@MODULES.register("needs-numbers")
class _NeedsNumbers(nn.Module):
    """A Vision Transformer whose constructor looks at a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)
        self.bound = float(self.patch_embed.weight.detach().abs().max())
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.patch_embed(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


def test_a_module_that_needs_numbers_while_it_is_built_loads_as_well(tmp_path: Path) -> None:
    options = {"embed_dim": 32, "num_prefix_tokens": 0, "patch_size": 8, "image_size": 32, "blocks": "blocks"}
    backbone = create_backbone("module:needs-numbers", layers=(1, 3), pretrained=False, options=options)
    fuser = create_fuser("average", in_channels=32, num_layers=2)
    model = build_model(backbone, fuser, tiny_llm(49), image_token_id=49)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_config_and_tokenizer_of_the_language_model_are_read_once(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    for auto in (AutoConfig, AutoTokenizer):
        original = auto.from_pretrained

        def note(name: str, *args: Any, original: Any = original, auto: Any = auto, **kwargs: Any) -> Any:
            if str(name) == tiny_recipe.model.llm:
                read.append(auto.__name__)
            return original(name, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", note)
    assemble(tiny_recipe.model, tiny_recipe.finetune)
    assert sorted(read) == ["AutoConfig", "AutoTokenizer"]

    read.clear()
    process = PartialState(cpu=True)
    source = model_source(tiny_recipe.model)
    plan = Plan(tiny_recipe, source, RunFolder(tmp_path), STAGES, STAGES, None, False, (), StopRequest(), process)
    check_start(plan, [])
    assert sorted(read) == ["AutoConfig", "AutoTokenizer"]
