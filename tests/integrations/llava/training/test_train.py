"""Both stages end to end: what learns, what stays, what a run leaves behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.config.schema import PARTS, Recipe
from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.data import ConversationDataset, read_samples
from integrations.llava.modeling import assemble, set_trainable
from integrations.llava.training import RANDOM, train


def part_of(name: str) -> str:
    return next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))


class _Snapshots(TrainerCallback):
    """Copies all weights when a stage begins and when it ends."""

    def __init__(self) -> None:
        self.taken: list[dict[str, torch.Tensor]] = []

    def _take(self, model: torch.nn.Module) -> None:
        self.taken.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **_: object
    ) -> None:
        self._take(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: torch.nn.Module, **_: object
    ) -> None:
        self._take(model)


def test_each_stage_changes_its_parts_and_no_bit_of_the_others(tiny_recipe: Recipe, tmp_path: Path) -> None:
    snapshots = _Snapshots()
    train(tiny_recipe, tmp_path / "run", callbacks=[snapshots])
    before, middle, again, after = snapshots.taken

    for start, end, trainable in (
        (before, middle, tiny_recipe.pretrain.trainable),
        (again, after, tiny_recipe.finetune.trainable),
    ):
        changed = {part_of(name) for name in start if not torch.equal(start[name], end[name])}
        assert changed == set(trainable)
    assert all(torch.equal(middle[name], again[name]) for name in middle)


def test_a_run_leaves_everything_needed_to_repeat_and_use_it(run_folder: Path, tiny_recipe: Recipe) -> None:
    assert load_recipe(run_folder / "recipe.yaml") == tiny_recipe
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [
        (s, n) for s in ("pretrain", "finetune") for n in (1, 2, 3)
    ]
    assert all(row["loss"] > 0 for row in rows)
    for stage in ("pretrain", "finetune"):
        assert list((run_folder / "logs" / stage).glob("events.out.tfevents*"))
        assert (run_folder / stage / "adapter.safetensors").is_file()
    assert load_model(run_folder).config.prompt_template["name"] == "v1"
    assert not [*run_folder.rglob(".*saving*"), *run_folder.rglob(".*.part")]


def test_parameter_counts_say_what_was_trained(run_folder: Path) -> None:
    counts = json.loads((run_folder / "parameters.json").read_text())
    weights = load_file(run_folder / "model.safetensors")

    for stage, trained in (("pretrain", {"fuser", "projector"}), ("finetune", {"fuser", "projector", "llm"})):
        assert {part for part, count in counts[stage].items() if count["trainable"]} == trained
        assert sum(sum(count.values()) for count in counts[stage].values()) == sum(t.numel() for t in weights.values())


def test_the_same_seed_gives_the_same_weights(tiny_recipe: Recipe, run_folder: Path, tmp_path: Path) -> None:
    again = train(tiny_recipe, tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (run_folder, again))

    assert all(torch.equal(first[name], second[name]) for name in first)


def test_finetune_can_start_from_an_earlier_pretrain(tiny_recipe: Recipe, run_folder: Path, tmp_path: Path) -> None:
    adapter = run_folder / "pretrain" / "adapter.safetensors"
    snapshots = _Snapshots()
    train(tiny_recipe, tmp_path / "run", stages=["finetune"], adapter=adapter, callbacks=[snapshots])

    for name, tensor in load_file(adapter).items():
        assert torch.equal(snapshots.taken[0][name], tensor)


def test_accumulated_micro_batches_give_the_loss_of_one_batch(tiny_recipe: Recipe, tmp_path: Path) -> None:
    losses = []
    for micro_batch_size in (4, 2):
        stage = dataclasses.replace(
            tiny_recipe.pretrain, micro_batch_size=micro_batch_size, loss_average="token", max_steps=2
        )
        folder = train(
            dataclasses.replace(tiny_recipe, pretrain=stage), tmp_path / str(micro_batch_size), stages=["pretrain"]
        )
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])

    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grouped", [False, True])
def test_every_epoch_has_an_order_of_its_own(
    grouped: bool, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    plain = ConversationDataset.__getitem__

    def getitem(dataset: ConversationDataset, index: int) -> Any:
        taken.append(index)
        return plain(dataset, index)

    monkeypatch.setattr(ConversationDataset, "__getitem__", getitem)
    stage = dataclasses.replace(tiny_recipe.pretrain, epochs=2, max_steps=None, group_by_modality=grouped)
    train(dataclasses.replace(tiny_recipe, pretrain=stage), tmp_path / "run", stages=["pretrain"])

    first, second = taken[:8], taken[8:]
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second


def test_batches_without_images_train(tiny_recipe: Recipe, data_folder: Path, tmp_path: Path) -> None:
    samples = [sample for sample in read_samples(data_folder / "train.json") if "image" not in sample]
    (tmp_path / "text.json").write_text(json.dumps(samples))
    data = dataclasses.replace(tiny_recipe.finetune.data, path=str(tmp_path / "text.json"))
    recipe = dataclasses.replace(tiny_recipe, finetune=dataclasses.replace(tiny_recipe.finetune, data=data))

    folder = train(recipe, tmp_path / "run", stages=["finetune"], adapter=RANDOM)

    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_batch_in_which_nothing_is_supervised_has_loss_zero(tiny_recipe: Recipe, tmp_path: Path) -> None:
    samples = [{"conversations": [{"from": "human", "value": "word " * 40}, {"from": "gpt", "value": "end"}]}] * 4
    (tmp_path / "cut.json").write_text(json.dumps(samples))
    data = dataclasses.replace(tiny_recipe.finetune.data, path=str(tmp_path / "cut.json"), max_length=30)
    recipe = dataclasses.replace(tiny_recipe, finetune=dataclasses.replace(tiny_recipe.finetune, data=data))
    folder = train(recipe, tmp_path / "run", stages=["finetune"], adapter=RANDOM)

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [0, 0, 0]


def test_a_folder_with_a_run_is_kept_unless_told_otherwise(tiny_recipe: Recipe, tmp_path: Path) -> None:
    folder = train(tiny_recipe, tmp_path / "run", stages=["pretrain"])
    (folder / "notes.txt").write_text("mine")

    with pytest.raises(ValueError, match="already holds a finished run"):
        train(tiny_recipe, folder, stages=["pretrain"])
    train(tiny_recipe, folder, stages=["pretrain"], overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_faults_in_the_data_are_found_before_anything_is_built(tiny_recipe: Recipe, tmp_path: Path) -> None:
    bad = [
        {
            "id": "x",
            "image": "nowhere.png",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}],
        }
    ]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    data = dataclasses.replace(tiny_recipe.finetune.data, path=str(tmp_path / "bad.json"))
    finetune = dataclasses.replace(tiny_recipe.finetune, data=data)

    with pytest.raises(ValueError, match=r"nowhere.png: missing"):
        train(dataclasses.replace(tiny_recipe, finetune=finetune), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stage_without_data_says_how_to_name_them(tiny_recipe: Recipe, tmp_path: Path) -> None:
    data = dataclasses.replace(tiny_recipe.pretrain.data, path="")
    recipe = dataclasses.replace(tiny_recipe, pretrain=dataclasses.replace(tiny_recipe.pretrain, data=data))

    with pytest.raises(ValueError, match=r"stage pretrain: no data; give --pretrain.data.path"):
        train(recipe, tmp_path / "run")


def test_every_parameter_belongs_to_a_part(tiny_recipe: Recipe) -> None:
    model = assemble(tiny_recipe.model).model
    counts = set_trainable(model, tuple(PARTS))

    assert all(count["trainable"] and not count["frozen"] for count in counts.values())


def test_random_weights_need_a_description_of_the_language_model(tiny_recipe: Recipe) -> None:
    model = dataclasses.replace(tiny_recipe.model, llm_pretrained=False, llm_architecture={})
    with pytest.raises(ValueError, match="model.llm_architecture has to describe it: model_type, hidden_size"):
        assemble(model)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tiny_recipe: Recipe) -> None:
    architecture = {"model_type": "llama", "vocab_size": 20, "hidden_size": 32, "num_attention_heads": 2}
    model = dataclasses.replace(tiny_recipe.model, llm_pretrained=False, llm_architecture=architecture)
    model = dataclasses.replace(model, tokenizer=tiny_recipe.model.llm)
    with pytest.raises(
        ValueError, match=r"has \d+ tokens, but the language model has embeddings for 20; set model.tok"
    ):
        assemble(model)
