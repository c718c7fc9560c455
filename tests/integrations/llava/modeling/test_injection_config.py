"""Layer injection as a checkpoint's config has it: what cannot be is refused when the model is built."""

from __future__ import annotations

from typing import Any

import pytest

from integrations.llava.modeling.model import FusedLlavaForConditionalGeneration
from layerfuse.errors import InputError
from tests.integrations.llava.modeling.injected_parts import make_model

PAIRS_FORM = r"give \[layer of the backbone, decoder layer\] each, .* or injection null"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": [[4, 4]]}, r"decoder layer 4, but the language model has 4, counted from 0: 0\.\.3"),
        ({"pairs": [[0, 1]]}, r"the backbone taps layers \(1, 2, 3, 4\) .* layers \(0,\) are injected"),
        ({"pairs": [[9, 1]]}, r"layer 9 is outside this backbone \(4 blocks"),
        ({"pairs": [[1, -1], [4, 0]]}, r"pairs has \[1, -1\]; give"),
        ({"pairs": None}, r"injection.pairs of the config is None; " + PAIRS_FORM),
        ({"pairs": [4, 1]}, r"injection.pairs of the config is \[4, 1\]; " + PAIRS_FORM),
        ({"pairs": [["4", 1]]}, r"injection.pairs of the config is \[\['4', 1\]\]; " + PAIRS_FORM),
        ({"pars": []}, r"field of the config's injection 'pars' is unknown; did you mean 'pairs'\? Known: merger, "),
        ({"merger": None}, r"injection.merger is empty; give text"),
        ({"merger": "pixel_shuffle_mlp"}, r"gives 4 tokens an image, but the fuser 'concat' gives 16"),
        ({"merger_options": [1]}, r"injection.merger_options is \[1\]; give keys with values"),
        ({"when": "middle"}, r"injection.when is 'middle'; give one of: before, after"),
        (
            None,
            r"injection of the config is \[\[4, 1\]\]; give its fields, pairs, merger, merger_options, when, or null",
        ),
    ],
)
def test_a_config_that_injects_what_cannot_be_is_refused(changes: dict[str, Any] | None, message: str) -> None:
    config = make_model().config
    described = config.injection
    assert described is not None
    config.injection = [[4, 1]] if changes is None else described | changes  # type: ignore[assignment]
    with pytest.raises(InputError, match=message):
        FusedLlavaForConditionalGeneration(config)


def test_a_config_without_pairs_injects_nothing_and_one_counted_from_the_end_what_it_means() -> None:
    config = make_model().config
    assert config.injection is not None
    config.injection = config.injection | {"pairs": [[-1, 1], [1, 0]]}
    inner = FusedLlavaForConditionalGeneration(config).model
    assert inner.injection is not None and inner.injection.settings.pairs == ((4, 1), (1, 0))
    config.injection = config.injection | {"pairs": []}
    assert FusedLlavaForConditionalGeneration(config).model.injection is None
