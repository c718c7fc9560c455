"""docs/language_models.md, held against the templates, their sources, and the families that are trained in tests."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from integrations.llava.prompts import TEMPLATES, Template
from tests.integrations.llava.prompts.published_templates import PUBLISHED, family_tokenizer
from tests.integrations.llava.training.test_language_models_trained import FAMILIES

PAGE = Path(__file__).parents[4] / "docs" / "language_models.md"


def table(first: str) -> dict[str, list[str]]:
    """Rows of the table whose first column has that title, by their first entry."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = takewhile(lambda line: line.startswith("|"), lines[begin + 2 :])
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    return {row[0].strip("`"): row[1:] for row in cells}


def place_of_system(template: Template) -> str:
    if template.caption_only:
        return "left out"
    if not template.takes_system:
        return "refused"
    return "in front" if "{system}" in template.begin else "in the first question"


def test_every_template_is_in_the_table_with_its_tokens_and_its_source() -> None:
    rows = table("template")
    sources = {own.family: f"{own.model} ({own.source})" for own in PUBLISHED.values() if own.family}

    assert rows.keys() == TEMPLATES.keys()
    for name, (_, tokens, system, source) in rows.items():
        template = TEMPLATES[name]
        assert tokens.split() == ([f"`{token}`" for token in template.control_tokens] or ["none"])
        assert system == place_of_system(template)
        assert source == sources.get(name) or (name not in sources and ("v1" in source or "goldens" in source))


def test_every_family_that_is_trained_is_in_the_table() -> None:
    rows = table("family")

    assert rows.keys() == FAMILIES.keys()
    for name, (kind, template, tokenizer, embeddings) in rows.items():
        family, own = FAMILIES[name], family_tokenizer(PUBLISHED[name], sentencepiece=FAMILIES[name].sentencepiece)
        assert kind.strip("`") == MODEL_FOR_CAUSAL_LM_MAPPING[family.config].__name__
        assert template.strip("`") == family.template
        said = ["SentencePiece's kind" if family.sentencepiece else "bytes"]
        said += ["no unknown token"] if own.unk_token is None else []
        said += ["no first token"] if own.bos_token is None else []
        said += ["tokens swallow blanks"] if PUBLISHED[name].eats else []
        assert tokenizer.split(", ") == said
        assert embeddings.startswith("tied") == ("tie_word_embeddings" in family.fields)
