"""A checkpoint in VLMEvalKit, which has no entry points: put the model into its table, then let it run as always.

Run, in VLMEvalKit's environment and folder:
    python vlmevalkit_adapter.py RUN --data MMBench_DEV_EN --model layerfuse_llava
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import partial

from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

from integrations.llava import load_predictor


class LayerfuseLlava(BaseModel):
    """Answers messages, lists of {"type": "text" | "image", "value": text or path}, greedily, as LLaVA-1.5 does."""

    INTERLEAVE = True

    def __init__(self, run: str, max_new_tokens: int = 512) -> None:
        super().__init__()
        self.predictor, self.max_new_tokens = load_predictor(run), max_new_tokens

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """Answer one message; each part begins a line, and each image stands where its part does."""
        images = [part["value"] for part in message if part["type"] == "image"]
        prompt = "\n".join("<image>" if part["type"] == "image" else part["value"] for part in message)
        return self.predictor([images], [prompt], max_new_tokens=self.max_new_tokens)[0]


if __name__ == "__main__":
    supported_VLM["layerfuse_llava"] = partial(LayerfuseLlava, sys.argv.pop(1))
    runpy.run_path("run.py", run_name="__main__")
