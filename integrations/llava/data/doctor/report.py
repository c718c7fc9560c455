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
    """Describe a survey so that JSON can hold it.

    Args:
        survey: what was found.
        settings: what was asked for; written down as it is.

    Returns:
        `settings`; `num_samples`, `num_images`, `num_usable`; `sources`: name -> samples, images, problems, warnings;
        `kinds`: name -> level, title, advice, findings, samples, images, for the kinds that were met; `problems` and
        `warnings`: every finding with kind, index, place, sample_id, source, message and, where there is one, image
        and repair.
    """
    problems, warnings = _by_source(survey.problems), _by_source(survey.warnings)
    return {
        "settings": dict(settings),
        "num_samples": survey.num_samples,
        "num_images": sum(source.num_images for source in survey.sources.values()),
        "num_usable": len(survey.usable),
        "sources": {
            name: {
                "samples": source.num_samples,
                "images": source.num_images,
                "problems": problems[name],
                "warnings": warnings[name],
            }
            for name, source in survey.sources.items()
        },
        "kinds": {
            kind: {
                "level": KINDS[kind].level,
                "title": KINDS[kind].title,
                "advice": KINDS[kind].advice,
                "findings": len(own),
                "samples": len({finding.index for finding in own}),
                "images": len({finding.image for finding in own if finding.image is not None}),
            }
            for kind, own in _by_kind(survey.findings).items()
        },
        "problems": [finding.to_dict() for finding in survey.problems],
        "warnings": [finding.to_dict() for finding in survey.warnings],
    }


def _by_source(findings: Sequence[Finding]) -> Counter[str]:
    return Counter(finding.source for finding in findings)


def _by_kind(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    return {name: own for name in KINDS if (own := [finding for finding in findings if finding.kind == name])}


def sources_table(survey: Survey) -> str:
    """Samples, images and findings by the data set that they come from."""
    problems, warnings = _by_source(survey.problems), _by_source(survey.warnings)
    counts = [
        [source.num_samples, source.num_images, problems[name], warnings[name]]
        for name, source in survey.sources.items()
    ]
    names, counts = [*survey.sources, "total"], [*counts, list(map(sum, zip(*counts, strict=True)))]
    rows = [[name, *(f"{n:,}" if n else "–" for n in row)] for name, row in zip(names, counts, strict=True)]
    return _table(("source", "samples", "images", "problems", "warnings"), rows)


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


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rules = ["-" * width for width in column_widths([heads, *rows])]
    return "\n".join(aligned([heads, rules, *rows]))
