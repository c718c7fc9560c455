"""The dry run as a whole, and the page that it prints."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from integrations.llava.config import Recipe
from integrations.llava.config.yaml_io import load_recipe, recipe_names
from integrations.llava.dry_run import GPUS, dry_run, render
from integrations.llava.dry_run.report import WIDTH
from integrations.llava.dry_run.workload import TOKENS_PER_WORD
from tests.integrations.llava.prompts.published_templates import PUBLISHED
from tests.integrations.llava.tiny_parts import human_and_gpt, save_llm


@pytest.fixture(scope="module")
def page() -> str:
    return render(dry_run(load_recipe("mmfuser_7b"), gpu="a100-80"))


def flat(page: str) -> str:
    """The page as one line, so that it does not matter where lines end."""
    return " ".join(page.split())


def rows(page: str, title: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of the table under a title."""
    section = page[page.index(title) :].split("\n\n")[0]
    found: dict[str, list[str]] = {}
    for first, *others in (line.split() for line in section.splitlines()[1:]):
        found.setdefault(first, others)
    return found


def test_the_page_states_parameters_tokens_and_steps(page: str) -> None:
    parameters = rows(page, "Parameters")
    steps = rows(page, "Samples and steps")

    assert parameters["fuser"] == ["5,190,592", "–", "5,190,592", "–"]
    assert parameters["llm"] == ["–", "6,738,423,808", "6,738,423,808", "–"]
    assert "image      576 tokens" in page
    assert steps["pretrain"][0] == "558,128" and steps["pretrain"][-2:] == ["256", "2,181"]
    assert steps["finetune"][0] == "665,298" and steps["finetune"][-2:] == ["128", "5,198"]


def test_the_page_begins_with_how_many_gpus_to_take(page: str) -> None:
    verdict = re.search(
        r"^Verdict: needs at least 2 x a100-80, take 4: pretrain ([\d.]+), finetune ([\d.]+) of 79.2", page, re.M
    )

    assert verdict is not None and page.index("Verdict") < page.index("Model")
    # The peaks of its engines on four GPUs, and 1 GiB for CUDA.
    for said, row in zip(verdict.groups(), re.findall(r"^  4     \w+ \*.* ([\d.]+) +yes$", page, re.M), strict=True):
        assert float(said) == pytest.approx(float(row) + 1, abs=0.11)
    took = rows(page, "Hours at 40%")
    total = float(took["pretrain"][2]) + float(took["finetune"][2])
    assert f"{total:.1f} hours." in flat(page)[:400] or f"{total - 0.1:.1f} hours." in flat(page)[:400]


def test_the_verdict_names_the_engine_that_would_fit() -> None:
    recipe = load_recipe("mmfuser_7b", {"finetune.engine": "ddp"})
    verdict = flat(render(dry_run(recipe, gpu="a100-80", stages=["finetune"])))

    assert "does not fit on 8 x a100-80, nor on fewer. With --finetune.engine zero2 (2 GPUs) it does. Model" in verdict


def test_the_page_compares_hours_with_the_published_ones(page: str) -> None:
    hours = rows(page, "Hours at 40% of 312 TFLOP/s")
    reached = [int(share) for share in re.findall(r"(\d+)% of their peak", page)]

    # LLaVA's README: 3.5 and 10 hours on eight A100s. At 40 % of the peak the count comes near them.
    assert float(hours["pretrain"][-1]) == pytest.approx(3.5, rel=0.2)
    assert float(hours["finetune"][-1]) == pytest.approx(10, rel=0.25)
    assert len(reached) == 2 and all(25 < share < 55 for share in reached)


def test_the_page_has_a_row_for_every_engine_and_number_of_gpus(page: str) -> None:
    for stage, own in (("pretrain", "ddp"), ("finetune", "fsdp2")):
        section = page[page.index(f"Memory of one GPU in {stage}") :].split("\n\n")[0]
        found = re.findall(r"^  (\d)     (\w+)( \*)? .* (yes|tight|no)$", section, re.MULTILINE)
        assert [(gpus, engine) for gpus, engine, *_ in found] == [
            ("1", "none"),
            *((number, engine) for number in "248" for engine in ("ddp", "zero2", "zero3", "fsdp2")),
        ]
        assert {engine for _, engine, star, _ in found if star} == {own}
        assert all(part in section for part in ("weights", "gradients", "optimizer", "activations", "peak"))


def test_the_page_says_how_to_make_a_stage_fit() -> None:
    page = flat(render(dry_run(load_recipe("mmfuser_7b"), gpu="rtx4090", stages=["finetune"])))

    assert "To fit, set --finetune.micro_batch_size: 4 on 8 GPUs." in page
    assert "Verdict: needs 8 x rtx4090 with --finetune.micro_batch_size 4;" in page
    assert "On 1, 2, 4 GPUs not even one sample at a time fits." in page
    assert "pretrain" not in page


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_page_that_fits_a_terminal(name: str) -> None:
    page = render(dry_run(load_recipe(name)))

    assert all(len(line) <= WIDTH for line in page.splitlines() if "/" not in line)
    assert not any(line != line.rstrip() for line in page.splitlines())


def test_data_are_measured_and_their_problems_shown(data_folder: Path, tmp_path: Path) -> None:
    samples = json.loads((data_folder / "train.json").read_text())
    samples.append({"id": "lost", "image": "lost.png", "conversations": human_and_gpt("<image>\nWhat?", "one " * 3000)})
    file = tmp_path / "train.json"
    file.write_text(json.dumps(samples))
    values = {"finetune.data.path": str(file), "finetune.data.image_folder": str(data_folder)}

    report = dry_run(load_recipe("mmfuser_7b", values), stages=["finetune"])
    page = render(report)
    work = report.stages[0].workload

    assert work.samples == 13 and report.stages[0].steps == 1
    assert work.images == pytest.approx(9 / 13)
    assert work.longest == 2048
    assert "1 problem" in page and "image missing" in page and "lost" in page
    assert f"measured on {file}, {TOKENS_PER_WORD} tokens a word" in flat(page)


def test_lengths_are_words_and_images(data_folder: Path) -> None:
    values = {"pretrain.data.path": str(data_folder / "pretrain.json"), "pretrain.data.image_folder": str(data_folder)}
    work = dry_run(load_recipe("mmfuser_7b", values), stages=["pretrain"]).stages[0].workload

    assert work.images == 1
    # <image> Describe. number 0 on a wall
    assert work.text_tokens == pytest.approx(7 * TOKENS_PER_WORD)
    assert work.longest == round(576 + 7 * TOKENS_PER_WORD)


def test_a_template_that_does_not_fit_the_language_model_is_said(tiny_recipe: Recipe, tmp_path: Path) -> None:
    llm = save_llm(tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(llm)
    tokenizer.chat_template = PUBLISHED["mistral-v0.2"].jinja
    tokenizer.save_pretrained(llm)
    recipe = replace(tiny_recipe, model=replace(tiny_recipe.model, llm=str(llm)))
    text = " ".join(render(dry_run(recipe)).split())

    assert "template pretrain: plain, finetune: v1" in text
    assert (
        "finetune: template 'v1' and the language model: the tokenizer's own chat template writes '<s>[INST] Is" in text
    )
    assert "pretrain: template" not in text
    own = replace(recipe, finetune=replace(recipe.finetune, template="tokenizer"))
    assert "and the language model" not in render(dry_run(own))
    other = replace(recipe, finetune=replace(recipe.finetune, template="chatml"))
    with pytest.raises(ValueError, match=r"'chatml' writes <\|im_start\|>"):
        dry_run(other)


def test_a_template_of_a_tokenizer_that_is_not_at_hand_is_refused() -> None:
    with pytest.raises(ValueError, match="made of the language model's tokenizer, which is not at hand"):
        dry_run(load_recipe("mmfuser_7b", {"finetune.template": "tokenizer"}))


def test_padding_is_that_of_the_samplers_batches_and_gone_without_it(data_folder: Path, tmp_path: Path) -> None:
    """Operations grow with it; memory, of a micro batch of the longest samples, does not."""
    samples = json.loads((data_folder / "pretrain.json").read_text())[:4]
    for sample, count in zip(samples, (10, 20, 30, 40), strict=True):
        sample["conversations"] = human_and_gpt("<image>", " ".join(["one"] * (count - 1)))
    file = tmp_path / "lengths.json"
    file.write_text(json.dumps(samples))
    values: dict[str, Any] = {"data.path": str(file), "data.image_folder": str(data_folder), "batch_size": 4}

    def stage(**changes: Any) -> Any:
        given = {f"pretrain.{key}": value for key, value in (values | changes).items()}
        return dry_run(load_recipe("mmfuser_7b", given), stages=["pretrain"], num_gpus=[1]).stages[0]

    whole, dealt, free = (
        stage(micro_batch_size=4),
        stage(micro_batch_size=2, group_by_modality=True),
        stage(micro_batch_size=4, padding_free=True),
    )
    assert whole.workload.padding == pytest.approx(15 * TOKENS_PER_WORD)
    # The published sampler gives both micro batches as many words: the longest goes with the shortest.
    assert dealt.workload.padding == pytest.approx(10 * TOKENS_PER_WORD)
    assert free.workload.padding == 0
    assert free.run_flops < whole.run_flops and free.flops["backbone"] == whole.flops["backbone"]
    longer = (whole.workload.tokens + whole.workload.padding) / free.workload.tokens
    assert whole.flops["llm"].forward / free.flops["llm"].forward == pytest.approx(longer, rel=2e-3)
    assert [memory.peak for memory in free.memory] == [memory.peak for memory in whole.memory]


def test_padding_of_assumed_lengths_is_not_known() -> None:
    values = {"pretrain.padding_free": True}
    page = render(dry_run(load_recipe("mmfuser_7b", values)))

    assert rows(page, "Samples and steps")["pretrain"][4] == "0"
    assert rows(page, "Samples and steps")["finetune"][4] == "–"


def test_small_runs_are_written_in_small_units() -> None:
    page = render(dry_run(load_recipe("tiny"), gpu="rtx3090"))

    assert "Verdict: one rtx3090 is enough:" in page
    assert "Operations of a sample, GFLOP" in page and "Memory of one GPU in pretrain, MiB" in page
    assert "pretrain computes in fp32" in page and "No published hours" in page
    assert rows(page, "Samples and steps")["finetune"][-3:] == ["–", "32", "250"]


def test_a_gpu_without_bf16_is_named() -> None:
    assert "v100-32 has no bf16 units" in render(dry_run(load_recipe("mmfuser_7b"), gpu="v100-32"))


def test_quantised_weights_ask_for_an_engine_that_leaves_them_whole() -> None:
    recipe = load_recipe("mmfuser_7b_qlora", {"finetune.engine": "fsdp2"})

    assert "Quantised weights cannot be taken apart: set --finetune.engine ddp." in flat(render(dry_run(recipe)))


def test_batches_that_no_number_of_gpus_can_share_are_said_so() -> None:
    recipe = load_recipe("mmfuser_7b", {"finetune.batch_size": 3, "finetune.micro_batch_size": 3})

    one = dry_run(recipe, stages=["finetune"])
    assert {memory.num_gpus for memory in one.stages[0].memory} == {1}
    none = flat(render(dry_run(recipe, stages=["finetune"], num_gpus=[2, 4])))
    assert "batch_size=3 cannot be divided among these numbers of GPUs" in none
    assert "Verdict: no number of GPUs that was looked at can share the batches of all stages." in none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "a100-8"}, "GPU 'a100-8' is unknown; did you mean 'a100-80'"),
        ({"utilization": 40}, "utilization=40 is no share of the peak; give a number above 0 and up to 1"),
        ({"stages": []}, "no stage was asked for; give pretrain or finetune"),
        ({"stages": ["finetun"]}, "did you mean 'finetune'"),
    ],
)
def test_wrong_arguments_are_errors_that_help(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dry_run(load_recipe("mmfuser_7b"), **arguments)  # type: ignore[arg-type]


def test_every_gpu_has_memory_and_speed() -> None:
    assert {"h200", "h100", "a100-80", "a100-40", "l40s", "v100-32", "rtx4090"} <= set(GPUS)
    assert all(gpu.memory > 20 and gpu.tflops > 50 for gpu in GPUS.values())
