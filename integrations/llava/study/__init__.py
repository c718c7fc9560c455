"""Studies: several runs trained, evaluated and compared. The demo is one."""

from __future__ import annotations

from .demo import run_demo
from .grid import DemoSettings
from .results import DemoResults
from .statistics import conclude, estimate

__all__ = ["DemoResults", "DemoSettings", "conclude", "estimate", "run_demo"]
