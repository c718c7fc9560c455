"""The command line of evaluation: a run folder, questions, a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from integrations.llava.evaluation import (
    TASKS,
    Evaluation,
    Judge,
    JudgedTask,
    Task,
    evaluate,
    evaluation_table,
    read_predictions,
    read_questions,
    score_predictions,
    write_evaluation,
)
from integrations.llava.inference import find_shard
from layerfuse.errors import InputError, UserError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from the command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.model is None) == (arguments.predictions is None):
        parser.error("give either --model FOLDER or --predictions FILE")
    if (arguments.judge is None) != (arguments.judge_model is None):
        parser.error("--judge URL and --judge-model NAME go together")
    if arguments.task is None and (arguments.protocol or arguments.judge):
        parser.error("--protocol and --judge belong to a --task; kinds of questions of your own have neither")
    if arguments.task is not None and arguments.image_folder is None:
        parser.error("--task reads its questions and images from a folder; give it as --image-folder FOLDER")
    try:
        task = None if arguments.task is None else _task(arguments)
        evaluation = _evaluate(arguments, task)
    except UserError as error:
        parser.error(str(error))
    print(
        "other processes have questions left; the last one scores"
        if evaluation is None
        else evaluation_table(evaluation)
    )
    if evaluation is not None and task is not None and task.note:
        print(f"{arguments.task}: {task.note}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m integrations.llava evaluate",
        description="Ask a trained model every question of a file or a task, and score its answers by kind.",
    )
    add = parser.add_argument
    add("--model", help="folder of a finished run")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--questions", help="question file: JSON lines of question_id, image, text, kind, answer")
    asked.add_argument("--task", help=f"a task that loads its questions from --image-folder: {', '.join(TASKS)}")
    add("--protocol", help="how a --task asks and scores: llava, lmms or official (default: the first that it has)")
    add("--judge", metavar="URL", help="of the OpenAI-compatible endpoint whose model scores a --task, …/v1")
    add("--judge-model", metavar="NAME", help="the judge, as the endpoint knows it")
    add("--judge-key", metavar="VARIABLE", help="environment variable that holds the judge's key (default: no key)")
    add(
        "--image-folder",
        "--images",
        help="what names of images are relative to (default: 'images' beside the question file)",
    )
    add("--predictions", help="score this predictions.jsonl in place of a model")
    add(
        "--output",
        help="folder for answers, predictions, metrics; continued (default: MODEL/evaluation, for a task /TASK in it)",
    )
    add("--overwrite", action="store_true", help="replace other answers and predictions in --output")
    add("--shard", metavar="INDEX/COUNT", help="answer a share (default: torchrun's RANK/WORLD_SIZE); the last scores")
    add("--batch-size", type=int, default=32)
    add("--max-new-tokens", type=int, help="longest answer (default: the task's, or 32)")
    add("--device", help="torch device (default: CUDA if there is one, else the CPU)")
    return parser


def _evaluate(arguments: argparse.Namespace, task: Task | None) -> Evaluation | None:
    if arguments.predictions is not None:
        asked = read_questions(arguments.questions) if task is None else task.load(arguments.image_folder)
        evaluation = score_predictions(asked, read_predictions(arguments.predictions), task=task)
        if arguments.output is not None:
            write_evaluation(evaluation, arguments.output, overwrite=arguments.overwrite)
        return evaluation
    return evaluate(
        arguments.model,
        task or arguments.questions,
        arguments.image_folder or Path(arguments.questions).parent / "images",
        output=_output(arguments),
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        device=arguments.device,
        overwrite=arguments.overwrite,
        shard=find_shard(arguments.shard),
    )


def _output(arguments: argparse.Namespace) -> Path:
    return Path(arguments.output or Path(arguments.model) / "evaluation" / (arguments.task or ""))


def _task(arguments: argparse.Namespace) -> Task:
    """The task by its name, with protocol and judge; the judge's replies are kept in the output."""
    kind = TASKS.get(arguments.task)
    task = kind() if arguments.protocol is None else kind(arguments.protocol)
    if arguments.judge is not None:
        if not isinstance(task, JudgedTask):
            judged = [name for name in TASKS if issubclass(TASKS.get(name), JudgedTask)]
            raise InputError(f"no judge scores {arguments.task}; leave --judge out, or take {' or '.join(judged)}.")
        scored = arguments.predictions is not None and arguments.output is None
        folder = Path(arguments.predictions).parent if scored else _output(arguments)
        replies = folder / "judge.jsonl"
        task.judge = Judge(arguments.judge, arguments.judge_model, replies, key_variable=arguments.judge_key)
    return task
