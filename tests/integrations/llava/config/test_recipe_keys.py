"""The page of a recipe's keys, which is made from the dataclasses."""

from __future__ import annotations

import re

from integrations.llava.config import load_recipe
from tools.recipe_keys import PAGE, render_page


def test_the_page_is_that_of_todays_dataclasses() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page(), "run `python -m tools.recipe_keys` and commit the page"


def test_every_key_of_the_page_is_one_that_a_recipe_takes() -> None:
    sections = re.findall(r"^## (.*)\n\n.*\n.*\n((?:\|.*\n)+)", render_page(), re.MULTILINE)
    keys = {
        ".".join(filter(None, (place, key)))
        for title, rows in sections
        for place in (re.findall(r"`([\w.]+)`", title) or [""])
        for key in re.findall(r"^\| `(\w+)`", rows, re.MULTILINE)
    }
    recipe = load_recipe("tiny")
    for key in keys:
        owner = recipe
        *parts, name = key.split(".")
        for part in parts:
            owner = getattr(owner, part)
        assert hasattr(owner, name), key
    assert {"model.fuser", "model.injection.pairs", "pretrain.data.path", "finetune.lora.rank", "report_to"} <= keys
