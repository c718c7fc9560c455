"""What the processes of a run have to agree on: work that one does for all, errors that all raise, requests to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

__all__ = ["any_process", "on_main"]

Result = TypeVar("Result")


def on_main(work: Callable[[], Result]) -> Result:
    """Do something in the main process for all of them; every process has to call this.

    Without it, an error in one process leaves the others waiting for it.

    Args:
        work: done in the main process alone; its result can be pickled.

    Returns:
        Its result, in every process.

    Raises:
        OSError, ValueError: what the work raised, in every process.
    """
    state = PartialState()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = work()
        except (OSError, ValueError) as error:
            outcome[1] = error
    if state.num_processes > 1:
        result, failure = outcome
        # The main process keeps its own: a traceback does not travel.
        outcome = broadcast_object_list([result, failure])
        outcome[1] = failure or outcome[1]
    if outcome[1] is not None:
        raise outcome[1]
    done: Result = outcome[0]
    return done


def any_process(flag: bool) -> bool:
    """Tell every process whether any of them says yes; every process has to call this."""
    state = PartialState()
    if state.num_processes == 1:
        return flag
    together = torch.tensor(int(flag), device=state.device)
    torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
    return bool(together.item())
