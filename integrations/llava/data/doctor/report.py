"""What the data doctor says: a report for programs (JSON) and tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from integrations.llava._text import aligned, column_widths

from .findings import KINDS, Finding
from .survey import Survey

__all__ = ["findings_table", "sources_table", "survey_report", "verdict"]

_EXAMPLE_WIDTH = 108


def survey_report(survey: Survey, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A survey as JSON can hold it.

    Args:
        survey: of a data file.
        settings: what was asked for; written down as it is.

    Returns:
        `settings`; `num_samples`, `num_images`, `num_usable`; `sources`: name -> samples, images, problems, warnings;
        `kinds`: name -> level, title, advice, findings, samples, images, for the kinds that were met; `problems` and
        `warnings`: every finding with kind, index, place, sample_id, source, message and, where there is one, image
        and repair.
    """
    return {
        "settings": dict(settings),
        "num_samples": survey.num_samples,
        "num_images": sum(source.num_images for source in survey.sources.values()),
        "num_usable": len(survey.usable),
        "sources": {
            name: dict(zip(("samples", "images", "problems", "warnings"), counts, strict=True))
            for name, counts in _source_counts(survey).items()
        },
        "kinds": {
            kind: {
                "level": KINDS[kind].level,
                "title": KINDS[kind].title,
                "advice": KINDS[kind].advice,
                "findings": len(findings),
                "samples": len({finding.index for finding in findings}),
                "images": len({finding.image for finding in findings if finding.image is not None}),
            }
            for kind, findings in _by_kind(survey.findings).items()
        },
        "problems": [finding.to_dict() for finding in survey.problems],
        "warnings": [finding.to_dict() for finding in survey.warnings],
    }


def _source_counts(survey: Survey) -> dict[str, list[int]]:
    """Source -> number of samples, images, problems and warnings."""
    problems = Counter(finding.source for finding in survey.problems)
    warnings = Counter(finding.source for finding in survey.warnings)
    return {
        name: [source.num_samples, source.num_images, problems[name], warnings[name]]
        for name, source in survey.sources.items()
    }


def _by_kind(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    return {name: own for name in KINDS if (own := [finding for finding in findings if finding.kind == name])}


def sources_table(survey: Survey) -> str:
    """Samples, images and findings by the data set that they come from."""
    counts = _source_counts(survey)
    total = list(map(sum, zip(*counts.values(), strict=True)))
    heads = ["source", "samples", "images", "problems", "warnings"]
    rows = [[name, *(f"{n:,}" if n else "–" for n in row)] for name, row in [*counts.items(), ("total", total)]]
    rules = ["-" * width for width in column_widths([heads, *rows])]
    return "\n".join(aligned([heads, rules, *rows]))


def findings_table(survey: Survey) -> str:
    """Every kind of fault that was met: how often, the first case, and what to do."""
    blocks = []
    for heading, findings in (
        ("Problems: training cannot use these samples.", survey.problems),
        ("Warnings: training copes with these.", survey.warnings),
    ):
        if findings:
            blocks.append("\n".join([heading, *(_describe(kind, own) for kind, own in _by_kind(findings).items())]))
    return "\n\n".join(blocks)


def _describe(kind: str, findings: Sequence[Finding]) -> str:
    first = f"{findings[0].place}, {findings[0]}"
    if len(first) > _EXAMPLE_WIDTH:
        first = f"{first[: _EXAMPLE_WIDTH // 2]} … {first[-_EXAMPLE_WIDTH // 2 :]}"
    title, advice = KINDS[kind].title, KINDS[kind].advice
    return f"{len(findings):>9,} × {title} ({kind})\n{'':12}{first}\n{'':12}{advice}"


def verdict(survey: Survey) -> str:
    """The whole in one sentence."""
    if not survey.findings:
        return f"{survey.num_samples:,} samples, nothing found."
    return (
        f"{len(survey.findings):,} findings: {len(survey.problems):,} problems and {len(survey.warnings):,} warnings; "
        f"{len(survey.usable):,} of {survey.num_samples:,} samples can be used."
    )
