"""The embedded backbone: a tiny CLIP vision transformer, pretrained contrastively on coarse captions.

As in CLIP (arXiv:2103.00020), an image is matched with its caption among those of a batch. The captions
say what the photograph shows, how many objects there are, and which ("red circle"); they never
mention the string, nor where anything is. So nothing rewards late layers for keeping the characters.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from integrations.llava.synthetic.photographs import PHOTOGRAPHS
from integrations.llava.synthetic.rendering import render_array
from integrations.llava.synthetic.scene import CELL, COLORS, IMAGE_SIZE, SHAPES, Scene, sample_scene

from .training import deterministic, make_optimizer, make_schedule

__all__ = ["BackboneRecipe", "coarse_words", "pretrain_backbone", "to_pixels"]

_LOG = logging.getLogger(__name__)

MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class BackboneRecipe:
    """How the embedded backbone is made.

    Attributes:
        num_images: scenes in the pool that batches are drawn from.
        learning_rate: peak rate of AdamW.
        seed: of scenes, weights and batches.
        num_threads: torch threads; part of the result.
        bfloat16: multiply matrices in bfloat16; faster where the processor has the instructions.
    """

    num_blocks: int = 6
    embed_dim: int = 96
    num_heads: int = 4
    num_images: int = 12000
    batch_size: int = 192
    num_steps: int = 450
    learning_rate: float = 1.5e-3
    seed: int = 1000
    num_threads: int = 1
    bfloat16: bool = True


def coarse_words(scene: Scene) -> list[str]:
    """Return the words of a scene's coarse caption: photograph, number of objects, each object's colour and shape."""
    words = [scene.photograph, str(len(scene.objects))]
    return words + sorted(f"{item.color} {item.shape}" for item in scene.objects)


_WORDS = (*PHOTOGRAPHS, "2", "3", "4", "5", *(f"{color} {shape}" for color in COLORS for shape in SHAPES))


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, normalised as the image processor does that is saved."""
    pixels = images.permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def pretrain_backbone(folder: str | Path, recipe: BackboneRecipe | None = None) -> None:
    """Train the backbone by a recipe (None: that of the shipped weights); save it and its image processor."""
    recipe = recipe or BackboneRecipe()
    with deterministic(recipe.seed, num_threads=recipe.num_threads):
        images, bags = _pool(recipe)
        model = _train(recipe, images, bags)
    model.half().save_pretrained(folder)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=list(MEAN), image_std=list(STD)
    ).save_pretrained(folder)


def _pool(recipe: BackboneRecipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the training scenes: (n, H, W, 3) uint8 images, (n, words) float bags of caption words."""
    images = np.empty((recipe.num_images, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    bags = np.zeros((recipe.num_images, len(_WORDS)), dtype=np.float32)
    for index in tqdm(range(recipe.num_images), desc="backbone: scenes", disable=None):
        scene = sample_scene(np.random.default_rng([recipe.seed, index]), "train")
        images[index] = render_array(scene)
        bags[index, [_WORDS.index(word) for word in coarse_words(scene)]] = 1
    return torch.from_numpy(images), torch.from_numpy(bags)


def _build(recipe: BackboneRecipe) -> CLIPVisionModel:
    """Return the untrained backbone."""
    config = CLIPVisionConfig(
        hidden_size=recipe.embed_dim,
        intermediate_size=4 * recipe.embed_dim,
        projection_dim=recipe.embed_dim,
        num_hidden_layers=recipe.num_blocks,
        num_attention_heads=recipe.num_heads,
        image_size=IMAGE_SIZE,
        patch_size=CELL,
        # A random start at the default 0.02 hardly moves for hundreds of steps at this width.
        initializer_factor=2.0,
    )
    model = CLIPVisionModel(config)
    # At the usual start, position codes are drowned by the patches, and nothing in coarse captions asks for them;
    # then no later layer knows where it is, and boxes cannot be learned from it.
    codes = _sine_codes(IMAGE_SIZE // CELL, recipe.embed_dim)
    with torch.no_grad():
        model.get_parameter("embeddings.position_embedding.weight")[1:] = codes
    return model


def _sine_codes(side: int, width: int) -> torch.Tensor:
    """Return sines and cosines of row and column at several wavelengths: (side², width)."""
    wavelengths = side * 2.0 ** torch.linspace(1, -1.5, width // 4)
    angles = 2 * torch.pi * torch.arange(side)[:, None] / wavelengths
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def _train(recipe: BackboneRecipe, images: torch.Tensor, bags: torch.Tensor) -> CLIPVisionModel:
    """Run the contrastive steps and return the trained backbone."""
    model, width = _build(recipe), recipe.embed_dim
    # What encodes captions is needed here only.
    words = nn.Linear(len(_WORDS), width)
    mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    head = nn.Linear(width, width, bias=False)
    scale = nn.Linear(1, 1, bias=False)
    nn.init.constant_(scale.weight, np.log(10))
    modules = [model, words, mlp, head, scale]
    optimizer = make_optimizer(modules, learning_rate=recipe.learning_rate)
    schedule = make_schedule(optimizer, num_steps=recipe.num_steps)
    progress = tqdm(range(recipe.num_steps), desc="backbone: contrastive", disable=None)
    for step in progress:
        index = torch.randint(len(images), (recipe.batch_size,))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
            pooled = model(to_pixels(images[index])).pooler_output
        seen = F.normalize(head(pooled.float()), dim=-1)
        hidden = words(bags[index])
        said = F.normalize(hidden + mlp(hidden), dim=-1)
        logits = scale.weight.exp() * seen @ said.T
        target = torch.arange(len(index))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for m in modules for p in m.parameters()], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == recipe.num_steps - 1:
            accuracy = (logits.argmax(1) == target).float().mean().item()
            progress.set_postfix(loss=f"{loss.item():.3f}", matched=f"{accuracy:.0%}")
            _LOG.info("step %d: loss %.3f, matched %.1f%%", step, loss.item(), 100 * accuracy)
    return model
