"""Models in the layouts of others, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlavaForConditionalGeneration

from tests.integrations.llava.checkpoints.foreign import save_llava_hf, save_published, tiny_llava_hf
from tests.integrations.llava.tiny_parts import make_tokenizer

VOCABULARY = len(make_tokenizer("llama"))


@pytest.fixture(scope="session")
def published_llm() -> LlavaForConditionalGeneration:
    """A LLaVA of transformers whose language model has the tokenizer's rows and no others, as published ones have."""
    return tiny_llava_hf(vocabulary=VOCABULARY, image_token=VOCABULARY - 1)


@pytest.fixture(scope="session")
def mmfuser_folder(published_llm: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published MMFuser checkpoint, its vision model included."""
    folder = tmp_path_factory.mktemp("mmfuser") / "checkpoint"
    save_published(published_llm, folder)
    return folder


@pytest.fixture(scope="session")
def llava_folder(published_llm: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published LLaVA-1.5 checkpoint in two `.bin` shards, without its vision model, as the released ones are."""
    folder = tmp_path_factory.mktemp("llava") / "checkpoint"
    save_published(published_llm, folder, fused=False, tower=False, kind="sharded bin")
    return folder


@pytest.fixture(scope="session")
def llava_hf_model() -> LlavaForConditionalGeneration:
    """A LLaVA of transformers with rows for `<image>` and `<pad>`, and four that fill up."""
    return tiny_llava_hf(vocabulary=VOCABULARY + 6, image_token=VOCABULARY)


@pytest.fixture(scope="session")
def llava_hf_folder(llava_hf_model: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, saved."""
    folder = tmp_path_factory.mktemp("hf") / "checkpoint"
    save_llava_hf(llava_hf_model, folder)
    return folder
