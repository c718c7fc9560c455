"""The demo: data, both stages for each fuser, evaluation, report."""

from __future__ import annotations

from integrations.llava.demo.cli import main

__all__ = ["main"]
