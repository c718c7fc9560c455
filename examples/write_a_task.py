"""A task in a file of one's own: named by `evaluate --tasks`, loaded, asked, scored, and shown in the tables.

Announce the class in your package's pyproject.toml, and the name is known wherever the package is installed:

    [project.entry-points."layerfuse.tasks"]
    clock = "my_package.write_a_task:ClockTask"

    python -m integrations.llava evaluate CHECKPOINT --tasks clock --data DATA

Run:
    python examples/write_a_task.py --data runs/clocks    # draws clocks, and tries the task without a model
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Hashable, Mapping
from pathlib import Path

from PIL import Image, ImageDraw

from integrations.llava.evaluation import TASKS, NeededFile, Question, Task, predict, score_predictions, task_faults
from layerfuse.errors import InputError, MissingFileError

HALF_A_DAY = 12 * 60


@TASKS.register("clock")
class ClockTask(Task):
    """Right is the time to the minute; `close` is at most five minutes away.

    Example:
        ``What time is it?`` is answered ``3:30``.
    """

    title = "Clocks"
    source = "drawn by examples/write_a_task.py"
    question_file = "clocks/times.json"
    parts = {"close": "within five minutes"}  # noqa: RUF012  (never changed)
    answer_lengths = {"llava": 16}  # noqa: RUF012

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the times, and the pictures of clocks."""
        source = "python examples/write_a_task.py --data DATA"
        return NeededFile(self.question_file, "times", source), NeededFile("clocks", "pictures", source)

    def load(self, folder: str | Path) -> list[Question]:
        """Read the times; the picture of a time is named after it."""
        path = Path(folder) / self.question_file
        if not path.is_file():
            raise MissingFileError(f"{path} does not exist; draw clocks with examples/write_a_task.py.")
        times = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(times, list) or not times:
            raise InputError(f"{path} is no list of times; draw clocks anew.")
        return [Question(time, f"clocks/{picture_name(time)}", "What time is it?", "clock", time) for time in times]

    def prompt(self, question: Question) -> str:
        """Return the question with the form of its answer."""
        return f"{question.text} Answer as 3:30."

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Compare minutes; what is no time is wrong."""
        said, right = minutes(answer), minutes(question.answer)
        if said is None or right is None:
            return {"accuracy": 0.0, "close": 0.0}
        away = min((said - right) % HALF_A_DAY, (right - said) % HALF_A_DAY)
        return {"accuracy": float(away == 0), "close": float(away <= 5)}

    def unit(self, question: Question) -> Hashable:
        """Return the clock: each is drawn alone by the bootstrap."""
        return question.question_id


def minutes(text: str) -> int | None:
    """The first time in a text, in minutes of half a day."""
    found = re.search(r"\b(\d{1,2}):(\d{2})\b", text)
    return None if found is None else (60 * int(found[1]) + int(found[2])) % HALF_A_DAY


def picture_name(time: str) -> str:
    return f"{time.replace(':', '_')}.png"


def draw_clocks(folder: Path, times: list[str]) -> None:
    """Write what the task loads."""
    (folder / "clocks").mkdir(parents=True, exist_ok=True)
    for time in times:
        image = Image.new("RGB", (64, 64), "white")
        draw = ImageDraw.Draw(image)
        draw.ellipse((2, 2, 61, 61), outline="black")
        hour, minute = map(int, time.split(":"))
        for share, length, width in ((hour / 12 + minute / 720, 16, 3), (minute / 60, 26, 1)):
            angle = 2 * math.pi * share
            end = (32 + length * math.sin(angle), 32 - length * math.cos(angle))
            draw.line((32, 32, *end), fill="black", width=width)
        image.save(folder / "clocks" / picture_name(time))
    (folder / ClockTask.question_file).write_text(json.dumps(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/clocks"), help="folder for the clocks")
    folder = parser.parse_args().data
    draw_clocks(folder, ["1:05", "3:30", "6:45", "11:50"])

    print("faults:", task_faults("clock", folder) or "none")
    task = ClockTask()
    questions = task.load(folder)
    predictions = predict(questions, folder, lambda images, prompts: ["It is 3:33."] * len(prompts), task=task)
    print("a model that always says 3:33:", dict(score_predictions(questions, predictions).kinds["clock"].scores))


if __name__ == "__main__":
    main()
