"""The command line of evaluation: a run folder, a question file, a table."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from integrations.llava.evaluation.evaluate import Evaluation, evaluate, read_predictions, write_evaluation
from integrations.llava.evaluation.scoring import score_answers, summarise
from integrations.llava.evaluation.task import read_questions
from layerfuse.errors import UserError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m integrations.llava evaluate",
        description="Ask a trained model every question of a file, and score its answers by kind of question.",
    )
    parser.add_argument("--model", help="folder of a finished run")
    parser.add_argument(
        "--questions", required=True, help="question file: JSON lines of question_id, image, text, kind, answer"
    )
    parser.add_argument("--images", help="folder of the images (default: 'images' beside the question file)")
    parser.add_argument("--predictions", help="score this predictions.jsonl in place of a model")
    parser.add_argument(
        "--output",
        help="folder for answers, predictions, metrics; continued (default: MODEL/evaluation)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace other answers and predictions in --output")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", help="torch device (default: CUDA if there is one, else the CPU)")
    arguments = parser.parse_args(argv)
    if (arguments.model is None) == (arguments.predictions is None):
        parser.error("give either --model FOLDER or --predictions FILE")
    try:
        evaluation = _evaluate(arguments)
    except UserError as error:
        parser.error(str(error))
    print(_table(evaluation))
    return 0


def _evaluate(arguments: argparse.Namespace) -> Evaluation:
    if arguments.predictions is not None:
        answers = score_answers(read_questions(arguments.questions), read_predictions(arguments.predictions))
        evaluation = Evaluation(kinds=summarise(answers), answers=answers)
        if arguments.output is not None:
            write_evaluation(evaluation, arguments.output, overwrite=arguments.overwrite)
        return evaluation
    return evaluate(
        arguments.model,
        arguments.questions,
        arguments.images or Path(arguments.questions).parent / "images",
        output=arguments.output or Path(arguments.model) / "evaluation",
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        device=arguments.device,
        overwrite=arguments.overwrite,
    )


def _table(evaluation: Evaluation) -> str:
    lines = [f"{'kind':<12}{'questions':>10}  accuracy"]
    for kind, own in evaluation.kinds.items():
        extra = ", ".join(f"{name} {value:.3f}" for name, value in own.scores.items() if name != "accuracy")
        lines.append(f"{kind:<12}{own.num_questions:>10}  {100 * own.accuracy:6.1f} %  {extra}".rstrip())
    mean = evaluation.metrics()["mean_accuracy"]
    return "\n".join([*lines, f"{'mean':<12}{len(evaluation.answers):>10}  {100 * mean:6.1f} %"])
