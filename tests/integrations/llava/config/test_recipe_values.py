"""Values of a recipe: each is of its field's type and within its limits, or is refused with file and key."""

from __future__ import annotations

import math
from typing import Any

import pytest

from integrations.llava.config.schema import StageConfig
from integrations.llava.config.yaml_io import load_recipe, parse_overrides
from layerfuse.errors import UserError


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("finetune.batch_size", True, "finetune.batch_size is true; give a whole number"),
        ("finetune.batch_size", 2.5, "finetune.batch_size is 2.5; give a whole number"),
        ("finetune.batch_size", math.inf, "finetune.batch_size is inf; give a whole number"),
        ("finetune.batch_size", None, "finetune.batch_size is empty; give a whole number"),
        ("finetune.learning_rate", "fast", "finetune.learning_rate is 'fast'; give a finite number"),
        ("finetune.learning_rate", math.nan, "finetune.learning_rate is nan; give a finite number"),
        ("finetune.learning_rate", False, "finetune.learning_rate is false; give a finite number"),
        ("finetune.learning_rates", [1e-4], r"finetune.learning_rates is \[0.0001\]; give keys with values"),
        ("finetune.learning_rates", {"fuser": "x"}, "finetune.learning_rates.fuser is 'x'; give a finite number"),
        ("finetune.gradient_checkpointing", 1, "finetune.gradient_checkpointing is 1; give true or false"),
        ("finetune.gradient_checkpointing", "maybe", "is 'maybe'; give true or false, or selective"),
        ("finetune.gradient_checkpointing", ["selective"], "; give true or false, or selective"),
        ("finetune.precision", True, "finetune.precision is true; give one of: fp32, bf16"),
        ("finetune.precision", [], r"finetune.precision is \[\]; give one of"),
        ("model.llm", 7, "model.llm is 7; put it in quotes to make it text"),
        ("model.llm", False, "model.llm is false; put it in quotes to make it text"),
        ("model.llm", None, "model.llm is empty; give text"),
        ("model.layers", [1, "two"], "model.layers is 'two'; give a whole number"),
        ("model.layers", [], "layers is empty; name at least one layer"),
        ("model.layers", [3, 8, 3], r"layers=\(3, 8, 3\) names 3 twice; name each layer once"),
        ("model.image_size", 0, "model: image_size=0 is too small; give at least 1"),
        ("finetune.log_every", 0, "finetune: log_every=0 is too small; give at least 1"),
        ("finetune.save_every", 0, "finetune: save_every=0 is too small; give at least 1"),
        ("finetune.epochs", 0, "finetune: epochs=0.0 is too small; give more than 0"),
        ("finetune.epochs", -1, "finetune: epochs=-1.0 is too small; give more than 0"),
        ("finetune.max_steps", -1, "finetune: max_steps=-1 is too small; give at least 1"),
        ("finetune.learning_rate", -1e-5, "finetune: learning_rate=-1e-05 is too small; give at least 0"),
        ("finetune.learning_rates", {"fuser": -1}, "learning_rates.fuser=-1.0 is too small; give at least 0"),
        ("finetune.warmup_ratio", 3, "finetune: warmup_ratio=3.0 is too large; give at most 1"),
        ("finetune.weight_decay", -0.1, "finetune: weight_decay=-0.1 is too small"),
        ("finetune.max_grad_norm", -1, "finetune: max_grad_norm=-1.0 is too small"),
        ("finetune.num_workers", -1, "finetune: num_workers=-1 is too small"),
        ("finetune.seed", 2**32, "finetune: seed=4294967296 is too large; give at most 4294967295"),
        ("finetune.data.max_length", 0, "finetune.data: max_length=0 is too small"),
        ("finetune.data.cache_images", -1, "finetune.data: cache_images=-1 is too small"),
        ("finetune.lora.rank", -1, "finetune.lora: rank=-1 is too small"),
        ("finetune.lora.alpha", 0, "finetune.lora: alpha=0.0 is too small; give more than 0"),
        ("finetune.lora.dropout", 1.5, "finetune.lora: dropout=1.5 is too large"),
        ("finetune.feature_cache_dtype", "fp16", "feature_cache_dtype is 'fp16'; give one of: fp32, bf16, int8"),
        ("finetune.feature_cache_dtype", "int8", "there is no feature_cache whose maps could have it; name its folder"),
        ("finetune.micro_batch_size", 5, "finetune: batch_size=128 is no multiple of micro_batch_size=5; change one"),
    ],
)
def test_a_value_of_another_type_or_outside_its_limits_is_refused_with_file_and_key(
    key: str, value: Any, message: str
) -> None:
    with pytest.raises(UserError, match=f"mmfuser_7b.yaml: .*{message}"):
        load_recipe("mmfuser_7b", {key: value})


def test_numbers_written_as_text_are_numbers_where_one_is_expected() -> None:
    overrides = {"finetune.learning_rate": "2e-5", "finetune.batch_size": "1_024", "finetune.max_steps": 1e4}
    stage = load_recipe("mmfuser_7b", overrides).finetune

    assert (stage.learning_rate, stage.batch_size, stage.max_steps) == (2e-5, 1024, 10_000)


def test_a_switch_with_a_third_setting_takes_its_word() -> None:
    key = "finetune.gradient_checkpointing"
    for given in ({key: "selective"}, parse_overrides([f"--{key}", "selective"])):
        assert load_recipe("mmfuser_7b", given).finetune.gradient_checkpointing == "selective"
    with pytest.raises(UserError, match="gradient_checkpointing is 'selectiv'; give one of: selective"):
        StageConfig(trainable=(), template="v1", gradient_checkpointing="selectiv")  # type: ignore[arg-type]


def test_limits_hold_for_recipes_made_in_python_too() -> None:
    with pytest.raises(UserError, match="learning_rate=nan is no finite number"):
        StageConfig(trainable=(), template="v1", learning_rate=math.nan)
