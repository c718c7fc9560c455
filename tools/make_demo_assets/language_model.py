"""The embedded language model: a tiny Llama, pretrained on scenes written out as text, as `writing` says.

So the model can already look things up when it meets images, and training has to align visual tokens with cell words,
no more. Cell words are blurred while training (mixed with other words, noise added): visual tokens are never exact.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from integrations.llava.prompts import IGNORE_INDEX, Rendered
from integrations.llava.synthetic.captions import DENSE_CAPTION_PROMPT, dense_caption
from integrations.llava.synthetic.questions import (
    CAPTION_PROMPT,
    SceneQuestion,
    caption,
    conversation,
    questions_of_kind,
)
from integrations.llava.synthetic.scene import sample_scene

from .tokenizer import CELL_WORDS, build_tokenizer, cell_description
from .training import deterministic, make_optimizer, make_schedule
from .writing import SceneWriter, embed_written, stands_for_image

__all__ = ["LanguageModelRecipe", "Phase", "pretrain_language_model"]

_ATTENTION = "layerfuse_plain_causal"
# Larger than the layers' own start, so that attention does not drown what a token is.
_EMBEDDING_SPREAD = 0.1
# One sample in so many is a dense caption, the others are conversations.
_DENSE_EVERY = {"all": 5, "dense": 2}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """A part of the training, with its own schedule and pool of samples.

    Attributes:
        learning_rate: peak rate of AdamW.
        place_spread: standard deviation of the place codes added to cell words; 0 for none.
        pool: the samples. `all`: conversations and a fifth of dense captions. `boxes`: the boxes of all objects and
            nothing else, about unblurred words; mixed with other questions, boxes stayed at chance for 1,500 steps,
            alone they were learned within 400. `dense`: every other sample the scene word by word, with place codes of
            any strength up to `place_spread`: visual tokens will carry theirs only once training has brought them out.
    """

    name: str
    num_steps: int
    learning_rate: float
    place_spread: float = 0.0
    pool: Literal["all", "boxes", "dense"] = "all"


@dataclass(frozen=True)
class LanguageModelRecipe:
    """How the embedded language model is made.

    Attributes:
        hidden_dim: width inside the MLPs.
        num_samples: scenes in the pool that batches are drawn from.
        phases: in the order of training.
        mixing: largest share of another cell word that is mixed into a cell word.
        noise: largest noise added to cell words, in units of their own standard deviation.
        seed: of scenes, weights and batches.
        num_threads: torch threads; part of the result.
        bfloat16: multiply matrices in bfloat16; three times as fast where the processor has the instructions.
    """

    num_blocks: int = 4
    embed_dim: int = 128
    num_heads: int = 4
    hidden_dim: int = 352
    num_samples: int = 20000
    batch_size: int = 32
    phases: tuple[Phase, ...] = (
        Phase("words", num_steps=2400, learning_rate=3e-3),
        Phase("places", num_steps=1500, learning_rate=2e-3, place_spread=0.1),
        Phase("boxes", num_steps=500, learning_rate=3e-3, place_spread=0.2, pool="boxes"),
        Phase("all", num_steps=800, learning_rate=2e-3, place_spread=0.2),
        Phase("dense captions", num_steps=600, learning_rate=2e-3, place_spread=0.2, pool="dense"),
    )
    mixing: float = 0.3
    noise: float = 0.4
    seed: int = 2000
    num_threads: int = 1
    bfloat16: bool = True


def pretrain_language_model(folder: str | Path, recipe: LanguageModelRecipe | None = None) -> None:
    """Train the language model by a recipe (None: that of the shipped weights); save it and its tokenizer."""
    recipe = recipe or LanguageModelRecipe()
    writer = SceneWriter(build_tokenizer())
    with deterministic(recipe.seed, num_threads=recipe.num_threads):
        model = _train(recipe, writer)
    model.half().save_pretrained(folder)
    writer.tokenizer.save_pretrained(folder)


def _turns(questions: Sequence[SceneQuestion]) -> list[tuple[str, str]]:
    return [(question.text, question.answer) for question in questions]


def _about_scenes(recipe: LanguageModelRecipe, writer: SceneWriter, *, dense_every: int) -> Iterator[Rendered]:
    """Write training scenes: dense captions in template `plain`, conversations in `v1` and `brief`."""
    for index in tqdm(range(recipe.num_samples), desc="llm: scenes", disable=None):
        rng = np.random.default_rng([recipe.seed, index])
        scene = sample_scene(rng, "train")
        if index % dense_every == 0:
            yield writer.write(scene, [(DENSE_CAPTION_PROMPT, dense_caption(scene))], "plain")
            continue
        turns = _turns(conversation(scene, rng))
        if rng.random() < 0.1:
            turns = [(CAPTION_PROMPT, caption(scene)), *turns[:5]]
        yield writer.write(scene, turns, "v1" if index % 5 < 2 else "brief")


def _about_boxes(recipe: LanguageModelRecipe, writer: SceneWriter) -> Iterator[Rendered]:
    """Write training scenes with a question for every box."""
    for index in tqdm(range(recipe.num_samples // 4), desc="llm: boxes", disable=None):
        rng = np.random.default_rng([recipe.seed, index, 1])
        scene = sample_scene(rng, "train")
        questions = questions_of_kind(scene, "box")
        turns = _turns([questions[i] for i in rng.permutation(len(questions))])
        yield writer.write(scene, turns, "v1" if index % 3 == 0 else "brief")


def _build(recipe: LanguageModelRecipe, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return the untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.embed_dim,
        intermediate_size=recipe.hidden_dim,
        num_hidden_layers=recipe.num_blocks,
        num_attention_heads=recipe.num_heads,
        max_position_embeddings=512,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # One table for reading and writing: a looked-up cell word is then close to the words that answer.
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(_ATTENTION)
    _start_by_looking_up(model)
    table = model.get_parameter("model.embed_tokens.weight")
    with torch.no_grad():
        table.normal_(0, _EMBEDDING_SPREAD)
        for word in CELL_WORDS:
            # A new token starts from the words that describe it, as is usual when a vocabulary grows.
            pieces = tokenizer(cell_description(word), add_special_tokens=False).input_ids
            table[tokenizer.convert_tokens_to_ids(word)] += table[pieces].sum(0)
    return model


def _start_by_looking_up(model: LlamaForCausalLM) -> None:
    """Start every attention as a soft look-up: tokens attend to their likes and copy what they find.

    Queries and keys share one random orthogonal map, and so do values and (transposed) outputs, after the mimetic
    initialisation of arXiv:2305.09828. From the usual start, look-ups took several times as many steps to appear.
    """
    for block in model.model.layers:
        attention = block.self_attn
        match, copy = (nn.init.orthogonal_(torch.empty_like(attention.q_proj.weight)) for _ in range(2))
        with torch.no_grad():
            attention.q_proj.weight.copy_(0.8 * match)
            attention.k_proj.weight.copy_(0.8 * match)
            attention.v_proj.weight.copy_(0.3 * copy)
            attention.o_proj.weight.copy_(0.3 * copy.T)


def _causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attend causally in plain matrix products: on CPU, twice as fast as SDPA's backward in bfloat16 at this size.

    (B, heads, T, C / heads) queries, keys and values give (B, T, heads, C / heads). No mask: padding is on the right.
    """
    length = query.shape[2]
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else query.dtype
    future = torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
    with torch.autocast("cpu", enabled=False):
        query, key, value = (states.to(dtype) for states in (query * scaling, key, value))
        weights = torch.softmax(query @ key.transpose(-1, -2) + future, dim=-1)
        return (weights @ value).transpose(1, 2), None


def _blur(
    embeddings: torch.Tensor,
    input_ids: torch.Tensor,
    table: torch.Tensor,
    cells: torch.Tensor,
    *,
    mixing: float,
    noise: float,
) -> torch.Tensor:
    """Mix every cell word of (B, T, D) embeddings with another one and add noise; other tokens stay exact."""
    in_image = stands_for_image(input_ids, cells).unsqueeze(-1)
    other = cells[torch.randint(len(cells), input_ids.shape)]
    share = mixing * torch.rand(*input_ids.shape, 1)
    mixed = torch.lerp(embeddings, F.embedding(other, table), share)
    spread = table[cells].detach().std() * noise * torch.rand(len(input_ids), 1, 1)
    return torch.where(in_image, mixed + spread * torch.randn_like(mixed), embeddings)


def _train(recipe: LanguageModelRecipe, writer: SceneWriter) -> LlamaForCausalLM:
    """Run the phases of language modelling, with a loss on answers only; return the model as it is to be saved."""
    AttentionInterface.register(_ATTENTION, _causal_attention)
    model = _build(recipe, writer.tokenizer)
    pools: dict[str, list[Rendered]] = {}
    for number, phase in enumerate(recipe.phases):
        if number:
            # Phases hand over in the precision that weights are stored in, so that each can be run by itself.
            model.half().float()
            torch.manual_seed(recipe.seed + number)
        if phase.pool not in pools:
            if phase.pool == "boxes":
                samples = _about_boxes(recipe, writer)
            else:
                samples = _about_scenes(recipe, writer, dense_every=_DENSE_EVERY[phase.pool])
            # Equal lengths stay in random order: Python's sort keeps the order in which they were drawn.
            pools[phase.pool] = sorted(samples, key=lambda sample: len(sample.input_ids))
        _run_phase(model, recipe, phase, writer, pools[phase.pool])
    # The usual attention from here on: saved folders never name the one of this file.
    model.set_attn_implementation("sdpa")
    # Untied again, as Vicuna is: finetuning may then read and write words differently.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def _run_phase(
    model: LlamaForCausalLM,
    recipe: LanguageModelRecipe,
    phase: Phase,
    writer: SceneWriter,
    samples: Sequence[Rendered],
) -> None:
    num_steps = phase.num_steps
    optimizer = make_optimizer([model], learning_rate=phase.learning_rate)
    schedule = make_schedule(optimizer, num_steps=num_steps)
    cells = torch.tensor(sorted(writer.cell_ids.values()))
    assert len(cells) == cells.max() - cells.min() + 1
    progress = tqdm(range(num_steps), desc=f"llm: {phase.name}", disable=None)
    for step in progress:
        # Neighbours, sorted by length, so that little is padded.
        start = int(torch.randint(len(samples) - recipe.batch_size + 1, ()))
        batch = samples[start : start + recipe.batch_size]
        input_ids = pad_sequence([torch.tensor(sample.input_ids) for sample in batch], batch_first=True)
        labels = pad_sequence([torch.tensor(sample.labels) for sample in batch], True, IGNORE_INDEX)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bfloat16):
            table = model.get_parameter("model.embed_tokens.weight")
            # Exact words first, while look-ups form; the full blur from half-way on.
            blur = 0.0 if phase.pool == "boxes" else min(1.0, 2 * step / num_steps)
            mixing, noise = blur * recipe.mixing, blur * recipe.noise
            spread = phase.place_spread * (torch.rand(()).item() if phase.pool == "dense" else 1.0)
            embeddings = embed_written(model, input_ids, cells, spread=spread)
            embeddings = _blur(embeddings, input_ids, table, cells, mixing=mixing, noise=noise)
            # Padding is on the right, so causal attention alone hides it.
            hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            target = labels[:, 1:]
            answered = target != IGNORE_INDEX
            logits = model.lm_head(hidden[:, :-1][answered]).float()
            loss = F.cross_entropy(logits, target[answered])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == num_steps - 1:
            right = (logits.argmax(-1) == target[answered]).float().mean().item()
            progress.set_postfix(loss=f"{loss.item():.3f}", tokens=f"{right:.0%}")
            _LOG.info("step %d: loss %.3f, answer tokens right %.1f%%", step, loss.item(), 100 * right)
