"""Engines: how several processes share a run (torch's DDP and FSDP2, DeepSpeed's ZeRO-2 and ZeRO-3)."""

from __future__ import annotations

from .engine import check_engine, engine_arguments, forget_engine, set_precision, shards

__all__ = ["check_engine", "engine_arguments", "forget_engine", "set_precision", "shards"]
