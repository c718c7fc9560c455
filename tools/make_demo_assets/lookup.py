"""How well the embedded language model answers questions about scenes that are written out as text."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from integrations.llava.synthetic.questions import KINDS, SceneQuestion, questions_of_kind
from integrations.llava.synthetic.scene import sample_scene

from .writing import SceneWriter, embed_written

__all__ = ["answer_accuracy", "is_right"]


def answer_accuracy(
    folder: str | Path, *, num_scenes: int = 100, template: str = "v1", seed: int = 4000
) -> dict[str, float]:
    """Ask one question of each kind about scenes of the test split.

    Args:
        folder: of the language model and its tokenizer.
        num_scenes: scenes to ask about.
        template: name of the prompt template.
        seed: of scenes and questions.

    Returns:
        For each kind the share of right answers: exact for words, intersection over union > 0.5 for boxes.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    writer = SceneWriter(tokenizer)
    cells = torch.tensor(sorted(writer.cell_ids.values()))
    right: dict[str, list[bool]] = defaultdict(list)
    for index in range(num_scenes):
        rng = np.random.default_rng([seed, index])
        scene = sample_scene(rng, "test")
        for kind in KINDS:
            questions = questions_of_kind(scene, kind)
            if not questions:
                continue
            question = questions[int(rng.integers(len(questions)))]
            ids = torch.tensor([writer.prompt(scene, question.text, template)])
            with torch.no_grad():
                embeddings = embed_written(model, ids, cells)
            written = model.generate(
                inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False
            )
            (answer,) = tokenizer.batch_decode(written, skip_special_tokens=True)
            right[kind].append(is_right(answer, question))
    return {kind: float(np.mean(right[kind])) for kind in KINDS}


def is_right(answer: str, question: SceneQuestion) -> bool:
    """Score one answer: exact for words, intersection over union > 0.5 for boxes."""
    answer = answer.strip()
    if question.box is None:
        return answer == question.answer
    try:
        x1, y1, x2, y2 = (float(part) for part in answer.strip("[]").split(","))
    except ValueError:
        return False
    left, top, right, bottom = question.box
    overlap = max(0.0, min(x2, right) - max(x1, left)) * max(0.0, min(y2, bottom) - max(y1, top))
    union = max(0.0, x2 - x1) * max(0.0, y2 - y1) + (right - left) * (bottom - top) - overlap
    return overlap / union > 0.5
