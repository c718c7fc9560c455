"""A multimodal model of one's own: tapped layers, a fuser, a projector and a language model; train, save, load.

Tiny random models, offline, seconds on a CPU. docs/using_in_your_project.md goes through it part by part.

Run:
    python examples/use_in_your_project.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from layerfuse import FusedEncoder, create_encoder

WORDS = ["<image>", "colour", "?", "red", "green", "blue"]


class MyModel(nn.Module):
    """A language model that reads fused tokens of an image in front of its words."""

    def __init__(self, encoder: FusedEncoder, language_model: PreTrainedModel) -> None:
        super().__init__()
        width = language_model.config.hidden_size
        self.encoder, self.language_model = encoder, language_model
        self.projector = nn.Sequential(nn.Linear(encoder.out_channels, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predict each word from the image and the words before it: images (B, 3, H, W), ids (B, T), out (B, T, V)."""
        tokens = self.projector(self.encoder(images))  # (B, N, C) -> (B, N, D)
        words = self.language_model.get_input_embeddings()(ids)  # (B, T, D)
        logits = self.language_model(inputs_embeds=torch.cat([tokens, words], dim=1)).logits
        return logits[:, tokens.shape[1] :]

    def save(self, folder: Path) -> None:
        """Write the parts, each with its own config."""
        self.encoder.save_pretrained(folder / "encoder")
        self.language_model.save_pretrained(folder / "language_model")
        save_model(self.projector, str(folder / "projector.safetensors"))

    @classmethod
    def load(cls, folder: Path) -> MyModel:
        """Read what `save` wrote."""
        encoder = FusedEncoder.from_pretrained(folder / "encoder")
        model = cls(encoder, LlamaForCausalLM.from_pretrained(folder / "language_model"))
        load_model(model.projector, str(folder / "projector.safetensors"))
        return model.eval()


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make noisy pictures of one colour each, (B, 3, 64, 64), and "colour ? red" as ids, (B, 3)."""
    colours = torch.randint(3, (size,))
    pictures = 0.3 * torch.randn(size, 3, 64, 64)
    pictures[torch.arange(size), colours] += 1.0
    return pictures, torch.stack([torch.full_like(colours, 1), torch.full_like(colours, 2), 3 + colours], dim=1)


def train(model: MyModel, *, steps: int) -> list[float]:
    """Train all but the frozen backbone on the answer's word, and return the loss of every step."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-3)
    losses = []
    for _ in range(steps):
        images, ids = batch(8)
        logits = model(images, ids[:, :-1])
        loss = nn.functional.cross_entropy(logits[:, -1], ids[:, -1])  # what follows "colour ?"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    encoder = create_encoder(
        "timm:vit_tiny_patch16_224", layers=(3, 6, 9, -2), fuser="mmfuser", image_size=64, pretrained=False
    ).freeze_backbone()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MyModel(encoder, LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes)))

    losses = train(model, steps=40)
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"loss of the first 5 steps {first:.2f}, of the last 5 {last:.2f}; it fell: {last < first / 2}")

    images, ids = batch(4)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.eval().save(Path(folder))
        loaded = MyModel.load(Path(folder))
        print("same after loading:", torch.equal(loaded(images, ids), model(images, ids)))
        answers = loaded(images, ids[:, :-1])[:, -1].argmax(-1)
    print("right:", [WORDS[i] for i in ids[:, -1]], "answered:", [WORDS[i] for i in answers])


if __name__ == "__main__":
    main()
