"""Results of a study, as plain data: the report is drawn from these and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from integrations.llava.evaluation import KindScores, ScoredAnswer

__all__ = ["DemoResults", "Example", "Figure", "FuserRun", "Panel", "PhotoAnswer", "Probe"]


@dataclass(frozen=True)
class FuserRun:
    """One fuser, trained in both stages with one seed, and evaluated on the test split.

    Attributes:
        folder: of the run, which `from_pretrained` reloads.
        layers: tapped layers.
        kinds: question kind -> scores.
        answers: in the order of the questions.
        losses: stage -> (step, loss) pairs.
        seconds: part (pretrain, finetune, evaluation) -> seconds it took when it was run.
        cost: parameters, tokens, out_channels and flops of the fuser, see `layerfuse.fusers.FuserCost`.
    """

    fuser: str
    seed: int
    folder: str
    layers: tuple[int, ...]
    kinds: Mapping[str, KindScores]
    answers: Sequence[ScoredAnswer]
    losses: Mapping[str, Sequence[tuple[int, float]]]
    seconds: Mapping[str, float]
    cost: Mapping[str, int]

    @property
    def average(self) -> float:
        """Accuracy averaged over the kinds of questions, between 0 and 1."""
        return sum(scores.accuracy for scores in self.kinds.values()) / len(self.kinds)


@dataclass(frozen=True)
class Probe:
    """Accuracy of a linear classifier on single patch tokens, by layer and by fuser.

    Attributes:
        title: what is read, such as ``"character in the cell"``.
        num_cells: test cells that the accuracies are measured on.
        chance: accuracy of always naming the commonest class.
        layers: layer number -> accuracy.
        fusers: fuser -> accuracy on its output.
    """

    title: str
    num_cells: int
    chance: float
    layers: Mapping[int, float]
    fusers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """A picture with its title; ``under`` is one that it is also laid over, half transparent. Both are PNG."""

    title: str
    picture: bytes
    under: bytes | None = None


@dataclass(frozen=True)
class Figure:
    """Pictures beside each other.

    Attributes:
        kind: what they show: ``layers``, ``readings``, ``shares`` or ``points``.
        note: of which images, of which fuser.
        panels: in order; the first of most kinds is what the model saw.
    """

    kind: str
    note: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Example:
    """PNG of a test image, and fuser -> scored answers about it: the same questions in the same order."""

    name: str
    image: bytes
    answers: Mapping[str, Sequence[ScoredAnswer]]


@dataclass(frozen=True)
class PhotoAnswer:
    """The user's photograph, as a smaller PNG, a question about it, and name of a run -> answer."""

    name: str
    image: bytes
    prompt: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class DemoResults:
    """All that a report shows.

    Attributes:
        runs: by fuser and seed, both in the order of the settings.
        chance: question kind -> accuracy without seeing the image.
        probes: the first is the legibility of text.
        figures: maps of the first test images, figures of one kind after another.
        examples: the first test images.
        facts: label -> value: data, steps, sizes.
        origin: command, commit, hardware, versions, date.
        seconds: part of the demo -> seconds, besides the runs.
        photo: the user's photograph, if there is one.
    """

    runs: Sequence[FuserRun]
    chance: Mapping[str, float]
    probes: Sequence[Probe] = ()
    figures: Sequence[Figure] = ()
    examples: Sequence[Example] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    photo: PhotoAnswer | None = None

    @property
    def fusers(self) -> tuple[str, ...]:
        """Names of the fusers, in the order of the settings."""
        return tuple(dict.fromkeys(run.fuser for run in self.runs))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, in the order of the settings."""
        return tuple(dict.fromkeys(run.seed for run in self.runs))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of questions, in the order of the test file."""
        return tuple(self.runs[0].kinds)

    @property
    def chance_levels(self) -> list[float]:
        """Accuracy without seeing the image: a number per kind, and their mean."""
        levels = [self.chance[kind] for kind in self.kinds]
        return [*levels, sum(levels) / len(levels)]

    def of(self, fuser: str) -> list[FuserRun]:
        """All runs of one fuser, in the order of the seeds."""
        return [run for run in self.runs if run.fuser == fuser]

    def accuracies(self, fuser: str) -> list[list[float]]:
        """Accuracies of one fuser's runs: a list per kind, and one of their means, as in `chance_levels`."""
        runs = self.of(fuser)
        return [[run.kinds[kind].accuracy for run in runs] for kind in self.kinds] + [[run.average for run in runs]]

    def rows(self) -> list[dict[str, Any]]:
        """A reproducible row per fuser, seed and kind: the lines of ``results.jsonl``."""
        return [
            {
                **self.origin,
                "fuser": run.fuser,
                "seed": run.seed,
                "layers": list(run.layers),
                "kind": kind,
                "num_questions": scores.num_questions,
                **dict(scores.scores),
                "chance": self.chance.get(kind),
                "seconds": dict(run.seconds),
                "fuser_cost": dict(run.cost),
            }
            for run in self.runs
            for kind, scores in run.kinds.items()
        ]
