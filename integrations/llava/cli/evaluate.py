"""The command line of evaluation: checkpoints and tasks, tables; or a run folder, questions, numbers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from shutil import get_terminal_size

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
from integrations.llava.evaluation.tables import (
    TEXT_WIDTH,
    add_score,
    checkpoint_names,
    chosen_tasks,
    evaluate_tasks,
    read_plan,
    write_tables,
)
from integrations.llava.inference import find_shard
from layerfuse.errors import InputError, UserError

from .options import CommandParser, add_stop_option

__all__ = ["main"]

_BUSY = "other processes have questions left; the last one scores"
_TABLES = "evaluation"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from the command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    fault = _wrong_usage(arguments)
    if fault:
        parser.error(fault)
    try:
        print(_run(arguments))
    except UserError as error:
        parser.error(str(error))
    return 0


def _wrong_usage(arguments: argparse.Namespace) -> str:
    """What is wrong with the options together; nothing if they fit."""
    for_tables = arguments.tasks is not None or arguments.add_score is not None
    if (arguments.judge is None) != (arguments.judge_model is None):
        return "--judge URL and --judge-model NAME go together"
    if arguments.tasks is not None and (not arguments.checkpoints or arguments.data is None):
        return "--tasks asks checkpoints: evaluate CHECKPOINT… --tasks paper --data DIR"
    if for_tables and (arguments.model, arguments.predictions, arguments.image_folder) != (None, None, None):
        return (
            "--tasks and --add-score go with CHECKPOINT…, --data, --output; not with --model, --predictions, --images"
        )
    if for_tables:
        return ""
    if arguments.checkpoints or arguments.data is not None:
        return "CHECKPOINT… and --data go with --tasks; for one model's own questions give --model and --questions"
    if (arguments.model is None) == (arguments.predictions is None):
        return "give either --model FOLDER or --predictions FILE"
    if arguments.task is None and (arguments.protocol or arguments.judge):
        return "--protocol and --judge belong to a --task; kinds of questions of your own have neither"
    if arguments.task is not None and arguments.image_folder is None:
        return "--task reads its questions and images from a folder; give it as --image-folder FOLDER"
    return ""


def _run(arguments: argparse.Namespace) -> str:
    """Do what was asked for; return what is to be printed."""
    if arguments.add_score is not None:
        return _add_scores(arguments)
    if arguments.tasks is not None:
        return _tables(arguments)
    task = None if arguments.task is None else _task(arguments)
    evaluation = _evaluate(arguments, task)
    if evaluation is None:
        return _BUSY
    note = f"\n{arguments.task}: {task.note}" if task is not None and task.note else ""
    return evaluation_table(evaluation) + note


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m integrations.llava evaluate",
        description="Ask checkpoints the questions of tasks, and write the paper's tables; or ask one trained model "
        "every question of a file or a task, and score its answers by kind.",
        epilog="evaluate CHECKPOINT… --tasks paper --data DIR writes tables; evaluate --add-score CHECKPOINT vqav2=78 "
        "enters what a server gave; evaluate --model RUN --questions FILE asks questions of your own.",
    )
    add = parser.add_argument
    add(
        "checkpoints", nargs="*", metavar="CHECKPOINT", help="folders of models, a column each of the tables of --tasks"
    )
    add("--data", metavar="DIR", help="folder of the data of --tasks; `data eval --data DIR` says what is there")
    add("--published", choices=("7b", "13b", "both"), default="7b", help="published models beside (default: 7b)")
    add("--model", help="folder of a finished run")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--questions", help="question file: JSON lines of question_id, image, text, kind, answer")
    asked.add_argument(
        "--tasks", nargs="+", metavar="NAME", help="tasks of the tables: paper, for all of its, or names as in --task"
    )
    asked.add_argument(
        "--add-score",
        nargs="+",
        metavar=("CHECKPOINT", "TASK=SCORE"),
        help="enter what a server or a judge elsewhere gave, such as vqav2=78.5, and write the tables of --output anew",
    )
    asked.add_argument("--task", help=f"a task that loads its questions from --image-folder: {', '.join(TASKS)}")
    add("--protocol", help="how tasks ask and score: llava, lmms or official (default: the first that each has)")
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
        help="folder for answers, predictions, metrics, tables; continued (default: MODEL/evaluation, for a task /TASK "
        f"in it; of tables, ./{_TABLES})",
    )
    add("--overwrite", action="store_true", help="replace other answers and predictions in --output")
    add("--shard", metavar="INDEX/COUNT", help="answer a share (default: torchrun's RANK/WORLD_SIZE); the last scores")
    add("--batch-size", type=int, default=32)
    add("--max-new-tokens", type=int, help="longest answer (default: the task's, or 32)")
    add_stop_option(add)
    add("--device", help="torch device (default: CUDA if there is one, else the CPU)")
    add("--num-workers", type=int, help="processes that prepare images (default: 4 with CUDA, else 0: threads)")
    add("--compile", action="store_true", help="compile decoding (CUDA): a slow start, then faster tokens")
    return parser


def _evaluate(arguments: argparse.Namespace, task: Task | None) -> Evaluation | None:
    if arguments.predictions is not None:
        asked = read_questions(arguments.questions) if task is None else task.load(arguments.image_folder)
        evaluation = score_predictions(asked, read_predictions(arguments.predictions), task=task)
        if arguments.output is not None:
            write_evaluation(evaluation, arguments.output, overwrite=arguments.overwrite, task=task)
        return evaluation
    return evaluate(
        arguments.model,
        task or arguments.questions,
        arguments.image_folder or Path(arguments.questions).parent / "images",
        output=_output(arguments),
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
        device=arguments.device,
        overwrite=arguments.overwrite,
        shard=find_shard(arguments.shard),
        num_workers=arguments.num_workers,
        compile=arguments.compile,
    )


def _tables(arguments: argparse.Namespace) -> str:
    output = Path(arguments.output or _TABLES)

    def judge(replies: Path) -> Judge:
        return Judge(arguments.judge, arguments.judge_model, replies, key_variable=arguments.judge_key)

    plan = evaluate_tasks(
        arguments.checkpoints,
        chosen_tasks(arguments.tasks),
        arguments.data,
        output,
        protocol=arguments.protocol,
        published=arguments.published,
        judge=None if arguments.judge is None else judge,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
        device=arguments.device,
        overwrite=arguments.overwrite,
        shard=find_shard(arguments.shard),
        num_workers=arguments.num_workers,
        compile=arguments.compile,
    )
    return _BUSY if plan is None else _written_tables(output)


def _written_tables(output: Path) -> str:
    """The tables as wide as the terminal, and the page's place."""
    text = write_tables(output, width=get_terminal_size((TEXT_WIDTH, 0)).columns)
    return f"{text}\n{output / 'tables.html'}"


def _add_scores(arguments: argparse.Namespace) -> str:
    output = Path(arguments.output or _TABLES)
    checkpoint, *entries = arguments.add_score
    given = {}
    for entry in entries:
        name, _, number = entry.rpartition("=")
        try:
            given[name] = float(number)
        except ValueError as error:
            raise InputError(f"{entry!r} is no score; give a task and a number, such as vqav2=78.5.") from error
    if not given:
        raise InputError("no score was given; give CHECKPOINT and TASK=SCORE, such as vqav2=78.5.")
    known = {name for name, _ in read_plan(output).columns}
    own = checkpoint if checkpoint in known else next(iter(checkpoint_names([checkpoint])))
    add_score(output, own, arguments.protocol, given)
    return _written_tables(output)


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
