"""Recipes: everything a training run is made of, as typed data.

A recipe is a YAML file in `recipes/` (or anywhere). Values given on the command line or in code win over the file. An
unknown key is an error that names the nearest right one. Paths that begin with `./` or `../` are meant from the
recipe file's own folder; all others as the process sees them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import draccus
import yaml

from layerfuse.registry import unknown_name_message

__all__ = [
    "PARTS",
    "STAGES",
    "DataConfig",
    "ModelConfig",
    "Recipe",
    "StageConfig",
    "dump_recipe",
    "load_recipe",
    "parse_overrides",
    "recipe_names",
]

RECIPE_FOLDER = Path(__file__).parent / "recipes"

PARTS: Mapping[str, tuple[str, ...]] = {
    "backbone": ("model.vision_tower.",),
    "fuser": ("model.fuser.",),
    "projector": ("model.multi_modal_projector.",),
    "llm": ("model.language_model.", "lm_head."),
}
"""What a stage can train: part -> how the names of its parameters begin."""

STAGES = ("pretrain", "finetune")
"""The stages of a run, in order."""

ImageMode = Literal["pad", "crop", "squash"]


@dataclass(frozen=True)
class ModelConfig:
    """What the model is built from.

    Attributes:
        family: backbone family of layerfuse: timm, open_clip, transformers, …
        backbone: the backbone's name in that library, or a folder.
        layers: tapped layers in the order the fuser wants them (0 = embeddings, -2 = penultimate block).
        image_size: pixels, one edge; None for the backbone's own.
        backbone_options: arguments for the library's own constructor.
        backbone_pretrained: load the library's weights; False gives random ones.
        fuser: name of the fuser.
        fuser_options: the fuser's own arguments.
        projector: kind of projector.
        llm: folder or hub name of a causal language model with its tokenizer.
        attention: transformers' name of the attention implementation.
    """

    family: str = "timm"
    backbone: str = "vit_large_patch14_clip_quickgelu_336.openai"
    layers: tuple[int, ...] = (-22, -17, -12, -7, -2)
    image_size: int | None = None
    backbone_options: dict[str, Any] = field(default_factory=dict)
    backbone_pretrained: bool = True
    fuser: str = "mmfuser"
    fuser_options: dict[str, Any] = field(default_factory=dict)
    projector: Literal["mlp2x_gelu"] = "mlp2x_gelu"
    llm: str = "lmsys/vicuna-7b-v1.5"
    attention: str = "sdpa"


@dataclass(frozen=True)
class DataConfig:
    """Where a stage's samples are, and how its images are brought to the backbone's size.

    Attributes:
        path: json or jsonl file in LLaVA's format.
        image_folder: folder that the samples' image names are relative to.
        image_mode: pad to a square with the mean colour, crop the centre, or squash.
        max_length: tokens, images expanded; longer samples are cut.
        cache_images: MiB of prepared images kept in memory, so that small data sets are decoded once.
        check_images: decode every image before training starts; "size" only reads headers, "none" trusts the files.
    """

    path: str = ""
    image_folder: str = ""
    image_mode: ImageMode = "pad"
    max_length: int = 2048
    cache_images: int = 256
    check_images: Literal["decode", "size", "none"] = "size"


@dataclass(frozen=True)
class StageConfig:
    """One stage of training.

    Attributes:
        trainable: parts that learn; names from `PARTS`. All others are frozen.
        template: name of the prompt template.
        data: the samples.
        learning_rate: peak learning rate.
        fuser_learning_rate: peak learning rate of the fuser; None for the same.
        batch_size: samples per device and step.
        gradient_accumulation: steps whose gradients are summed before the optimizer moves.
        epochs: passes over the data; ignored if `max_steps` is given.
        max_steps: optimizer steps.
        warmup_ratio: part of the steps over which the learning rate rises.
        weight_decay: for weights outside norms; never for biases.
        scheduler: transformers' name of the learning rate schedule.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them alone.
        precision: of the computation; parameters stay float32 under "fp32" and "bf16".
        gradient_checkpointing: recompute the language model's activations, to save memory.
        group_by_modality: batch samples of one modality and like lengths together.
        num_workers: processes that prepare samples; 0 prepares them in the training process.
        log_every: steps between two log entries; losses are kept for every step.
        seed: of the sampler and of new weights.
    """

    trainable: tuple[str, ...]
    template: str
    data: DataConfig = field(default_factory=DataConfig)
    learning_rate: float = 1e-3
    fuser_learning_rate: float | None = None
    batch_size: int = 16
    gradient_accumulation: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    scheduler: str = "cosine"
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    group_by_modality: bool = False
    num_workers: int = 0
    log_every: int = 10
    seed: int = 42

    def __post_init__(self) -> None:
        """Refuse parts that do not exist."""
        for part in self.trainable:
            if part not in PARTS:
                raise ValueError(unknown_name_message("trainable part", part, PARTS))


def _pretrain() -> StageConfig:
    return StageConfig(trainable=("fuser", "projector"), template="plain")


def _finetune() -> StageConfig:
    return StageConfig(
        trainable=("fuser", "projector", "llm"), template="v1", learning_rate=2e-5, group_by_modality=True
    )


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        name: what the recipe is called.
        model: what the model is built from.
        pretrain: first stage: fuser and projector learn.
        finetune: second stage: the language model learns too.
    """

    name: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: StageConfig = field(default_factory=_pretrain)
    finetune: StageConfig = field(default_factory=_finetune)

    def stage(self, name: str) -> StageConfig:
        """Look a stage up.

        Raises:
            ValueError: if there is no such stage.
        """
        if name not in STAGES:
            raise ValueError(unknown_name_message("stage", name, STAGES))
        return cast(StageConfig, getattr(self, name))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-5` as text; here it is a number."""


_Loader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package, sorted."""
    return tuple(sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml")))


def load_recipe(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe.

    Args:
        recipe: name of a recipe of this package, or path of a YAML file.
        overrides: dotted key -> value, such as {"finetune.learning_rate": 1e-5}; they win over the file.

    Returns:
        The recipe, every value typed and every default filled in.

    Raises:
        ValueError: if the recipe, a key or a value is not allowed; keys are suggested.
        FileNotFoundError: if the file does not exist.
    """
    path = _find(recipe)
    values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; a recipe is a mapping of keys to values.")
    values = _anchor(_with_base(values, path), path.parent)
    return _decode({"name": path.stem} | values, overrides or {}, origin=str(path))


def _with_base(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Resolve `base: other.yaml`: a variant shows only what differs."""
    base = values.pop("base", None)
    if base is None:
        return values
    base_path = path.parent / base
    if not base_path.is_file():
        raise FileNotFoundError(f"{path} derives from {base_path}, which does not exist.")
    inherited = yaml.load(base_path.read_text(encoding="utf-8"), Loader=_Loader)
    return _merge(_anchor(_with_base(inherited, base_path), base_path.parent), values)


def _find(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FileNotFoundError(f"recipe file {path} does not exist.")
        return path
    if str(recipe) not in recipe_names():
        message = unknown_name_message("recipe", str(recipe), recipe_names())
        raise ValueError(f"{message} A file of your own ends in .yaml.")
    return RECIPE_FOLDER / f"{recipe}.yaml"


def _decode(values: Mapping[str, Any], overrides: Mapping[str, Any], *, origin: str) -> Recipe:
    merged = _merge(_plain(draccus.encode(Recipe())), values)
    for key, value in overrides.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        merged = _merge(merged, nested)
    _check_keys(merged, origin)
    try:
        return draccus.decode(Recipe, merged)
    except draccus.utils.DecodingError as error:
        raise ValueError(f"{origin}: {error}") from error
    except draccus.utils.ParsingError as error:
        # A value refused by a class of ours arrives wrapped; its own message is the one that helps.
        raise ValueError(f"{origin}: {error.__cause__ or error}") from error


def _check_keys(values: Mapping[str, Any], origin: str) -> None:
    known = dict(_fields(Recipe))
    for key, kind in known.items():
        section = _lookup(values, key) if dataclasses.is_dataclass(kind) else {}
        if not isinstance(section, Mapping):
            raise ValueError(f"{origin}: {key!r} is a section with keys of its own; it cannot be {section!r}.")
    for key in _keys(values, known):
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f" did you mean {nearest[0]!r}?" if nearest else ""
            section = key.rpartition(".")[0]
            siblings = [name for name in known if name.rpartition(".")[0] == section] or list(known)
            raise ValueError(f"{origin}: unknown key {key!r};{hint} Known here: {', '.join(siblings)}.")


def _lookup(values: Mapping[str, Any], key: str) -> Any:
    value: Any = values
    for part in key.split("."):
        value = value.get(part, {}) if isinstance(value, Mapping) else {}
    return value


def _fields(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        yield prefix + item.name, hints[item.name]
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _fields(hints[item.name], f"{prefix}{item.name}.")


def _keys(values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping) and dataclasses.is_dataclass(known.get(f"{prefix}{name}")):
            yield from _keys(value, known, f"{prefix}{name}.")


def _merge(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _anchor(value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping):
        return {key: _anchor(entry, folder) for key, entry in value.items()}
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str((folder / value).resolve())
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read `--section.key value` pairs; several values, or none for a switch, are allowed.

    Args:
        arguments: what stands on the command line behind the command's own options.

    Returns:
        Dotted key -> value, values read as YAML.

    Raises:
        ValueError: if an argument stands where a `--key` is expected.
    """
    overrides: dict[str, Any] = {}
    key: str | None = None
    values: list[str] = []

    def store() -> None:
        if key is not None:
            read = [yaml.load(value, Loader=_Loader) for value in values]
            overrides[key] = True if not read else read[0] if len(read) == 1 else read

    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            store()
            key, values = name[2:].replace("-", "_"), [value] if equals else []
        elif key is None:
            raise ValueError(f"{argument!r} is not a key; overrides look like --finetune.learning_rate 2e-5.")
        else:
            values.append(argument)
    store()
    return overrides


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML with every value spelled out; `load_recipe` reads it back as the same recipe."""
    return yaml.safe_dump(_plain(draccus.encode(recipe)), sort_keys=False, allow_unicode=True)
