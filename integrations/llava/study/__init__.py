"""Studies: several runs trained, evaluated and compared. The demo is one."""

from __future__ import annotations

from .demo import run_demo
from .grid import DemoSettings, check_settings
from .results import DemoResults, FuserRun
from .statistics import conclude, estimate

__all__ = ["DemoResults", "DemoSettings", "FuserRun", "check_settings", "conclude", "estimate", "run_demo"]
