"""How well the embedded language model answers questions about scenes that are written out as text."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from integrations.llava.evaluation.metrics.boxes import intersection_over_union, parse_box
from integrations.llava.synthetic.questions import KINDS, SceneQuestion, questions_of_kind
from integrations.llava.synthetic.scene import sample_scene

from .writing import SceneWriter, embed_written

__all__ = ["answer_accuracy", "is_right"]


def answer_accuracy(folder: str | Path, *, num_scenes: int = 100, seed: int = 4000) -> dict[str, float]:
    """Ask a language model one question of each kind about scenes of the test split; return kind -> share right."""
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
            ids = torch.tensor([writer.prompt(scene, question.text)])
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
    if question.box is None:
        return answer.strip() == question.answer
    box = parse_box(answer)
    return box is not None and intersection_over_union(box, question.box) > 0.5
