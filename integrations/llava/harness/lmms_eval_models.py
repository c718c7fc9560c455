"""`layerfuse_llava` for lmms-eval; the only file that imports it, and which only lmms-eval imports.

    python -m lmms_eval --model layerfuse_llava --model_args pretrained=RUN --tasks mme --batch_size 8

The contract is that of lmms-eval 0.7.3's `api/model.py`, `api/task.py` and `evaluator.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.protocol import ChatMessages

from integrations.llava.inference import find_shard
from layerfuse.errors import InputError

from .answering import HarnessAnswers, HarnessQuestion
from .arguments import read_arguments
from .messages import read_messages

__all__ = ["LmmsEvalChat", "LmmsEvalSimple", "prefers_small_numbers"]

_logger = logging.getLogger(__name__)


class _Measured(tuple, GenerationResult):
    """A number and a truth value, as lmms-eval's documentation wants them.

    Its evaluator, of version 0.7.3, makes one text of such a pair, unless it takes it for a `GenerationResult`.
    """


class LmmsEvalSimple(lmms):
    """A checkpoint of ours as lmms-eval wants a model; each question a text, images in front or at its tags.

    Arguments are those of `HarnessArguments`, by keyword. The evaluator hands a process its own requests, so nothing is
    divided here.

    Raises:
        ValueError: as `read_arguments` and `load_predictor`.
    """

    is_simple = True

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.answers = HarnessAnswers(read_arguments(given))
        shard = find_shard(None)
        self._rank, self._world_size = shard.index, shard.count

    @property
    def device(self) -> Any:
        """Where the evaluator puts what processes tell one another."""
        return self.answers.device

    @property
    def batch_size(self) -> int:
        """Questions at a time."""
        return self.answers.arguments.batch_size

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answer requests, in their order."""
        return self.answers.generate(map(self._asked, requests), total=len(requests), show_bar=self._show_bar)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Tell the sum of log-probabilities of each continuation, and whether greedy decoding gives it.

        Of a multiple choice's options lmms-eval 0.7.3 takes the one of the *smallest* number, since its own models
        return losses: there the sum has the other sign, see `prefers_small_numbers`.
        """
        measured = self.answers.measure(self._measured(requests), total=len(requests), show_bar=self._show_bar)
        is_option = [isinstance(request.args[1], str) for request in requests]
        sign = -1 if any(is_option) and prefers_small_numbers() else 1
        return [
            _Measured((sign * number if option else number, greedy))
            for option, (number, greedy) in zip(is_option, measured, strict=True)
        ]

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refuse tasks of several rounds.

        Raises:
            ValueError: always.
        """
        tasks = sorted({str(request.task_name) for request in requests})
        raise InputError(
            f"{', '.join(tasks)}: asked in several rounds (generate_until_multi_round), of which each is written from "
            "the answer before; layerfuse_llava answers generate_until, loglikelihood and multiple_choice. "
            "Choose other tasks."
        )

    def clean(self) -> None:
        """Let go of the model; it is loaded again if it is asked again."""
        self.answers.unload()
        super().clean()

    @property
    def _show_bar(self) -> bool | None:
        return None if self.rank == 0 else False

    def _document(self, request: Any) -> Any:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]

    def _asked(self, request: Any) -> HarnessQuestion:
        context, decoding, find_images, *_ = request.args
        return HarnessQuestion(self._images(find_images, request), context, _key(request), decoding or {})

    def _measured(self, requests: Sequence[Any]) -> Iterator[HarnessQuestion]:
        for request in requests:
            if len(request.args) != 6:
                raise InputError(
                    f"{request.task_name} asks for options without their question (metric acc_mutual_info), which "
                    "layerfuse_llava does not answer; take acc or acc_norm."
                )
            context, answer, find_images, *_ = request.args
            answer = answer if isinstance(answer, str) else str(answer(self._document(request)))
            yield HarnessQuestion(self._images(find_images, request), context, answer=answer.strip())

    def _images(self, find: Callable[[Any], Any] | None, request: Any) -> list[Any]:
        found = None if find is None else find(self._document(request))
        if found is None:
            return []
        return list(found) if isinstance(found, list | tuple) else [found]


class LmmsEvalChat(LmmsEvalSimple):
    """The same for tasks that write messages; where one writes none, lmms-eval makes them of its text and images."""

    is_simple = False

    def _asked(self, request: Any) -> HarnessQuestion:
        _, write_messages, decoding, *_ = request.args
        messages = ChatMessages(messages=write_messages(self._document(request))).model_dump()["messages"]
        images, prompt = read_messages(messages)
        return HarnessQuestion(images, prompt, _key(request), decoding or {})


def prefers_small_numbers() -> bool:
    """Whether the installed lmms-eval chooses, of a multiple choice's options, the one of the smallest number.

    It is asked itself, on two options of which the first is likelier: log-probabilities are what its documentation
    wants, losses what version 0.7.3 compares.
    """
    task = SimpleNamespace(
        OUTPUT_TYPE="multiple_choice",
        config=SimpleNamespace(process_results=None),
        _metric_fn_list={"acc": None},
        multiple_input=0,
        multiple_target=0,
        doc_to_choice=lambda document: ["a", "b"],
        doc_to_target=lambda document: 0,
    )
    process: Any = ConfigurableTask.process_results
    try:
        result = getattr(process, "__wrapped__", process)(task, {}, [(-1.0, False), (-2.0, False)])
        return not result["acc"]
    except (AttributeError, KeyError, TypeError) as error:
        _logger.warning("lmms-eval scores multiple choices in an unknown way (%s); it gets log-probabilities", error)
        return False


def _key(request: Any) -> str:
    *_, number, task, split = request.args
    return f"{task}/{split}/{number}"
