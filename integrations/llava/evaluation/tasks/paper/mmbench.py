"""MMBench in English and Chinese: lettered options, scored by a server, or here over options in every order.

Layout: a table of tab-separated values, a line per question: index, question, hint, options A to D, answer, category,
picture in base64 and more. Options turned round are lines of their own, with 1,000,000 more in `index` for each turn.

Source: Liu et al., "MMBench: Is Your Multi-modal Model an All-around Player?", ECCV 2024; LLaVA's
``model_vqa_mmbench --single-pred-prompt`` and ``convert_mmbench_for_submission``; VLMEvalKit's ``can_infer``.
"""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from integrations.llava._text import listed
from layerfuse.errors import InputError, MissingPackageError

from ...metrics.option_letters import circular_letter
from ...option_lines import option_lines
from ...published_files import existing_file
from ...table_pictures import decoded_picture, stored_picture
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from .benchmark import BenchmarkTask
from .prompts import OPTION_LETTER

__all__ = ["MMBenchCnTask", "MMBenchTask"]

_LETTERS = "ABCD"
_TURN = 1_000_000
_NOT_SENT = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6
_SHORT_REFERENCE = 64
_COLUMNS = ("index", "question", *_LETTERS[:2], "image")
# What pandas, which the published scripts read the table with, takes for an empty cell.
_EMPTY = frozenset(
    [
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"),
        *("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    ]
)


@TASKS.register("mmbench")
class MMBenchTask(BenchmarkTask):
    r"""MMBench, dev split, in English.

    Under ``llava`` the server scores: `submission` is the Excel table that it takes. Under ``official`` the same
    answers are scored here, if the table holds the right ones: a question counts if it is answered right however its
    options are turned. The letter is found as VLMEvalKit finds it; where it would ask a judge, the answer is wrong, and
    counted as ``unread``.

    An oddity that is kept: an option whose text is "None", "N/A" or the like ends the options.

    Example:
        ``Which is the main topic?\nA. dogs\nB. cats\nAnswer with the option's letter from the given choices
        directly.`` is answered ``A``.
    """

    title = "MMBench"
    source = "MMBench: options in every order all right; LLaVA-1.5's prompt"
    protocols = ("llava", "official")
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 1024, "official": 1024}
    tables: ClassVar[tuple[str, ...]] = ("mmbench/mmbench_dev_20230712.tsv",)
    suffix: ClassVar[str] = OPTION_LETTER
    kind: ClassVar[str] = "mmbench"

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the table."""
        return (
            NeededFile(self.tables[0], "questions with their pictures", "MMBench; linked in LLaVA's Evaluation.md"),
        )

    def load(self, folder: str | Path) -> list[Question]:
        """Read the table, and store its pictures as files."""
        if self.protocol == "llava" and find_spec("openpyxl") is None:
            raise MissingPackageError(
                "MMBench's submission is an Excel table, which openpyxl writes, which is not installed; "
                "`pip install 'layerfuse[excel]'`, or take --protocol official."
            )
        path = next((path for name in self.tables if (path := Path(folder) / name).is_file()), None)
        path = path or existing_file(self, folder, self.tables[0])
        rows, names = [], {}
        for number, row in enumerate(_read_table(path), start=2):
            place = f"{path}, row {number}"
            if not row["index"].isdigit():
                raise InputError(f"{place}: index is {row['index']!r:.80}; get the file anew.")
            picture = row.pop("image")
            if len(picture) > _SHORT_REFERENCE:
                names[row["index"]] = stored_picture(folder, self.kind, decoded_picture(picture, place))
            rows.append((row, picture))
        # A turned question may name the row that holds its picture.
        missing = [row["index"] for row, picture in rows if row["index"] not in names and picture not in names]
        if missing or not rows:
            raise InputError(
                f"{path}: {len(missing)} of {len(rows)} rows have no picture: {listed(missing, most=10)}. Get it anew."
            )
        if self.protocol == "official" and all(int(row["index"]) < _TURN for row, _ in rows):
            raise InputError(
                f"{path} has no question with its options turned (index of {_TURN:,} and more), which the official "
                "rule is about. Give MMBench's own table, or take --protocol llava."
            )
        return [self._question(row, names[row["index"] if row["index"] in names else picture]) for row, picture in rows]

    def _question(self, row: Mapping[str, str], image: str) -> Question:
        right = row.get("answer", "")
        fields = dict(row)
        return Question(int(row["index"]), image, row["question"], self.kind, right or None, fields)

    def prompt(self, question: Question) -> str:
        """Return hint, question, options and the sentence that asks for the letter."""
        hint = question.fields.get("hint", "")
        start = "" if _is_nothing(hint) else f"{hint}\n"
        return start + question.text + option_lines(_options(question)) + self.suffix

    def unit(self, question: Question) -> Hashable:
        """A question in all its turns."""
        return int(question.question_id) % _TURN

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a letter, under ``official`` only."""
        if self.protocol == "llava":
            return {}
        if question.answer is None:
            raise InputError(
                f"question {question.question_id} has no right answer in its table; only MMBench's server knows it: "
                "take --protocol llava."
            )
        letter = circular_letter(answer, _options(question))
        return {"accuracy": float(letter == question.answer), "unread": float(letter is None)}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Count questions that are right in all turns, those right as they stand first, and the former by ability."""
        if self.protocol == "llava":
            return {}
        turns: dict[int, list[ScoredAnswer]] = defaultdict(list)
        for own in scores:
            turns[int(own.question.question_id) % _TURN].append(own)
        weights: Counter[str] = Counter()
        right: Counter[str] = Counter()
        first = 0
        for index, group in turns.items():
            # In a bootstrap's draw a question stands several times, in all its turns.
            times = max(Counter(own.question.question_id for own in group).values())
            ability = group[0].question.fields.get("l2-category", "")
            for name in {"accuracy", ability} - {""}:
                weights[name] += times
                right[name] += times * all(own.right for own in group)
            first += times * any(own.right for own in group if own.question.question_id == index)
        numbers = {name: right[name] / weights[name] for name in ("accuracy", *sorted(set(weights) - {"accuracy"}))}
        unread = sum(own.scores["unread"] for own in scores) / len(scores)
        return {**numbers, "one_order": first / weights["accuracy"], "unread": unread}

    def submission(self, predictions: Sequence[ScoredAnswer]) -> Mapping[str, bytes] | None:
        """Return the Excel table for the server: the table's columns but for pictures and the like, and answers."""
        if self.protocol != "llava":
            return None
        columns = [name for name in predictions[0].question.fields if name not in _NOT_SENT]
        rows: list[list[str | int | None]] = []
        for own in predictions:
            cells = own.question.fields
            row: list[str | int | None] = [None if cells[name] in _EMPTY else cells[name] for name in columns]
            row[columns.index("index")] = int(cells["index"])
            rows.append([*row[:_PREDICTION_COLUMN], own.prediction, *row[_PREDICTION_COLUMN:]])
        head = [*columns[:_PREDICTION_COLUMN], "prediction", *columns[_PREDICTION_COLUMN:]]
        return {f"{self.kind}.xlsx": _workbook([head, *rows])}


@TASKS.register("mmbench_cn")
class MMBenchCnTask(MMBenchTask):
    r"""MMBench, dev split, in Chinese; see `MMBenchTask`.

    Example:
        ``…\nA. 狗\nB. 猫\n请直接回答选项字母。`` is answered ``A``.
    """

    title = "MMBench-CN"
    source = MMBenchTask.source
    tables = ("mmbench_cn/mmbench_dev_cn_20231003.tsv", "mmbench/mmbench_dev_cn_20231003.tsv")
    suffix = "\n请直接回答选项字母。"
    kind = "mmbench_cn"


def _is_nothing(text: str) -> bool:
    return text in _EMPTY or text.lower() in ("nan", "none")


def _options(question: Question) -> dict[str, str]:
    """Options by letter, up to the first that is empty."""
    found = {}
    for letter in _LETTERS:
        text = question.fields.get(letter, "")
        if _is_nothing(text):
            break
        found[letter] = text
    return found


def _read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a table by column; the limit of a field's length, which pictures exceed, is put back behind."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", restval="")
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path} lacks the columns {', '.join(missing)}; get it anew.")
            return [{key: value for key, value in row.items() if key is not None} for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a table ({error}); get it anew.") from error
    finally:
        csv.field_size_limit(limit)


def _workbook(rows: Sequence[Sequence[str | int | None]]) -> bytes:
    """An Excel file of one sheet, the same bytes for the same rows."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    from openpyxl.writer.excel import ExcelWriter

    workbook = Workbook(write_only=True)
    sheet = workbook.create_sheet("Sheet1")
    for row in rows:
        cells = []
        for value in row:
            text = isinstance(value, str)
            cell = WriteOnlyCell(sheet, value=ILLEGAL_CHARACTERS_RE.sub("", value) if text else value)
            if text:
                cell.data_type = "s"  # never a formula, whatever an answer begins with
            cells.append(cell)
        sheet.append(cells)
    workbook.properties.created = workbook.properties.modified = datetime(2000, 1, 1)
    written, steady = io.BytesIO(), io.BytesIO()
    ExcelWriter(workbook, zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED)).save()
    # Without the time of writing, which every entry carries.
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(steady, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(zipfile.ZipInfo(entry.filename), source.read(entry), zipfile.ZIP_DEFLATED)
    return steady.getvalue()
