"""The terminal's conversation: streamed, remembered, stopped with Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from integrations.llava.cli.chat import main, print_answer
from integrations.llava.inference import Conversation
from integrations.llava.inference.predictor import Predictor
from integrations.llava.inference.sampling import SamplingParams
from tests.integrations.llava.inference.answering_parts import save_run
from tests.integrations.llava.tiny_parts import human_and_gpt

SHORT = SamplingParams(max_new_tokens=8)


def chat(run: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    assert main(["--model", str(run), "--max-new-tokens", "8", *arguments]) == 0


def stub(stream: Any) -> Any:
    """A predictor whose stream is given, and whose model reads any length."""
    prepare = type("Preparer", (), {"room": staticmethod(lambda *_: None), "sizes": staticmethod(list)})
    memory = staticmethod(lambda: None)
    return type("Stub", (), {"stream": staticmethod(stream), "prepare": prepare, "new_memory": memory})


def test_piped_questions_are_answered_with_what_was_said_before(
    run: Path,
    predictor: Predictor,
    data_folder: Path,
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = ["What number?", "", "Sure?", f"/image {data_folder / '1.png'}", "And this?", "/exit", "not read"]
    chat(run, lines, monkeypatch, "--image", str(data_folder / "0.png"))
    printed = capsys.readouterr().out.splitlines()

    turns = ["<image>\nWhat number?"]
    for num_images, following in ((1, "Sure?"), (1, "<image>\nAnd this?"), (2, None)):
        turns += [predictor([pictures[:num_images]], [human_and_gpt(*turns)], max_new_tokens=8)[0], following or ""]
    assert printed == [turns[1], turns[3], "images that go with the next message: 1", turns[5]]


def test_clear_forgets_words_and_images(
    run: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    chat(run, ["Sure?"], monkeypatch)
    fresh = capsys.readouterr().out
    chat(run, ["What number?", f"/image '{data_folder / '1.png'}'", "/clear", "Sure?"], monkeypatch)

    assert capsys.readouterr().out.endswith(f"next message: 1\nforgotten\n{fresh}")


def test_what_cannot_be_done_is_explained_and_the_conversation_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(run, ["/image nowhere.png", f"/image {__file__}", "/imag", "/image", "word " * 600, "What?"], monkeypatch)
    printed = capsys.readouterr().out

    assert "image nowhere.png does not exist" in printed
    assert "cannot be read" in printed
    assert "/imag is no command; there are:\n/image PATH" in printed
    assert "/image is no command" in printed
    assert "the model reads 512" in printed
    chat(run, ["What?"], monkeypatch)
    assert printed.endswith(capsys.readouterr().out)


def test_lines_that_are_no_text_are_told_and_the_conversation_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n/image caf\xe9\nWhat?\n"), encoding="utf-8")
    )
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["--model", str(run), "--max-new-tokens", "8"]) == 0
    told, missing, answer = written.getvalue().decode("ascii").splitlines()

    assert "holds half of a character" in told
    assert missing.startswith("image caf\\udce9 does not exist")
    assert answer


def test_an_answer_ends_where_the_models_positions_do_and_this_is_said(
    predictor: Predictor, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "word"
    while (room := predictor.prepare.room(words, []) or 0) >= 50:
        words += " word"
    assert room > 0
    conversation = Conversation(predictor, SamplingParams(max_new_tokens=100))
    print_answer(conversation, words)
    printed = capsys.readouterr()

    assert printed.err == f"(room for {room} more tokens is left; /clear forgets what was said)\n"
    assert printed.out.strip() == predictor([None], [words], max_new_tokens=room)[0]
    # Then the conversation is full.
    with pytest.raises(ValueError, match="the model reads 512"):
        print_answer(conversation, words)


def test_a_real_error_keeps_its_traceback(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("of the program")

    monkeypatch.setattr("integrations.llava.inference.predictor.load_model", fail)
    with pytest.raises(ValueError, match="of the program"):
        main(["--model", str(run)])


def test_help_lists_the_commands(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    chat(run, ["/help"], monkeypatch)
    printed = capsys.readouterr().out

    assert all(command in printed for command in ("/image PATH", "/clear", "/help", "/exit"))


def test_images_stand_where_the_message_says(
    predictor: Predictor, data_folder: Path, pictures: list[Image.Image]
) -> None:
    conversation = Conversation(predictor, SHORT)
    conversation.show(data_folder / "0.png")
    conversation.show(data_folder / "1.png")
    list(conversation.say("<image> or <image>?"))

    assert conversation.messages[0]["value"] == "<image> or <image>?"
    assert conversation.messages[1]["value"] == predictor([pictures[:2]], ["<image> or <image>?"], max_new_tokens=8)[0]
    assert conversation.shown == []


def test_a_message_that_fails_keeps_its_image_for_the_next(predictor: Predictor, data_folder: Path) -> None:
    conversation = Conversation(predictor, SHORT)
    conversation.show(data_folder / "0.png")
    with pytest.raises(ValueError, match="the model reads 512"):
        list(conversation.say("word " * 600))

    assert (conversation.messages, conversation.images, len(conversation.shown)) == ([], [], 1)


def test_a_sampled_turn_draws_anew(predictor: Predictor) -> None:
    conversation = Conversation(predictor, SamplingParams(max_new_tokens=8, temperature=2.0, seed=1))
    seeds = []

    def stream(*_: Any, sampling: SamplingParams, **__: Any) -> Any:
        seeds.append(sampling.seed)
        yield "x"

    conversation.predictor = stub(stream)
    list(conversation.say("a"))
    list(conversation.say("b"))

    assert seeds == [1, 3]


def test_ctrl_c_keeps_what_was_said_by_then(predictor: Predictor, capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    def stream(*_: Any, **__: Any) -> Any:
        try:
            yield "one "
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    conversation = Conversation(stub(stream), SHORT)
    print_answer(conversation, "Count.")

    assert conversation.messages == human_and_gpt("Count.", "one ")
    assert closed == [True]
    assert capsys.readouterr().out == "one \n"


def test_pieces_joined_are_the_answer_and_an_iterator_closed_early_keeps_what_was_said(predictor: Predictor) -> None:
    conversation = Conversation(predictor, SHORT)
    whole = "".join(conversation.say("What number?"))
    assert [whole] == predictor([None], ["What number?"], max_new_tokens=8)
    assert conversation.messages == human_and_gpt("What number?", whole)

    conversation.clear()
    pieces = conversation.say("What number?")
    first = next(pieces)
    pieces.close()
    assert conversation.messages == human_and_gpt("What number?", first)


def test_an_error_in_an_answer_forgets_the_message(predictor: Predictor) -> None:
    def stream(*_: Any, **__: Any) -> Any:
        yield "one "
        raise RuntimeError("of the device")

    conversation = Conversation(stub(stream), SHORT)
    with pytest.raises(RuntimeError, match="of the device"):
        list(conversation.say("Count."))
    assert conversation.messages == []


def test_a_message_stopped_before_the_first_word_is_forgotten(predictor: Predictor, pictures: Any) -> None:
    def stream(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt
        yield

    conversation = Conversation(stub(stream), SHORT)
    conversation.shown = pictures[:1]
    list(conversation.say("Count."))

    assert (conversation.messages, conversation.images, conversation.shown) == ([], [], pictures[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "image nowhere.png does not exist"),
        (["--num-beams", "2"], "beams cannot be streamed"),
        (["--temperature", "-1"], "temperature=-1.0 is negative"),
        ([], "holds no config.json"),
    ],
)
def test_the_command_explains_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


class Terminal:
    """A chat in a terminal of its own."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.main, other = pty.openpty()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
        self.process = subprocess.Popen(
            command,
            stdin=other,
            stdout=other,
            stderr=other,
            cwd=folder,
            env=environment,
            start_new_session=True,
            # A shell that runs tests in the background has them ignore Ctrl-C, and so would the chat.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(other)
        self.seen = ""

    def read(self) -> None:
        """Read what was printed since, and wait for something."""
        assert select.select([self.main], [], [], 120)[0], f"nothing more came behind {self.seen!r}"
        self.seen += os.read(self.main, 4096).decode(errors="replace")

    def wait_for(self, text: str) -> str:
        """Read until a text was printed; returns what stood before it."""
        while text not in self.seen:
            self.read()
        before, _, self.seen = self.seen.partition(text)
        return before

    def interrupt_until(self, text: str) -> None:
        """Press Ctrl-C until a text was printed: one that comes just before `input` begins to wait has no effect."""
        for _ in range(60):
            self.process.send_signal(signal.SIGINT)
            if select.select([self.main], [], [], 2)[0]:
                self.wait_for(text)
                return
        raise AssertionError(f"nothing more came behind {self.seen!r}")

    def type(self, text: str) -> None:
        os.write(self.main, text.encode())


def test_in_a_terminal_ctrl_c_stops_the_answer_and_not_the_program(
    root: Path, backbone_folder: Path, tmp_path: Path
) -> None:
    endless = save_run(tmp_path / "run", backbone_folder, ends=False, positions=2400)
    arguments = ["--model", str(endless), "--max-new-tokens", "1900"]
    terminal = Terminal([sys.executable, "-m", "integrations.llava", "chat", *arguments], root)
    try:
        terminal.wait_for("template 'v1'; /help lists the commands")
        terminal.wait_for("> ")
        terminal.type("What number?\n")
        terminal.wait_for("What number?\r\n")
        terminal.read()
        terminal.process.send_signal(signal.SIGINT)
        answer = terminal.wait_for("\r\n> ")
        # Whole, it has about four characters a token; on a busy machine many are made before the key is heard.
        assert 0 < len(answer) < 2 * 1900
        assert "/exit" not in answer

        terminal.interrupt_until("/exit or Ctrl-D leaves")
        terminal.type("/exit\n")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.main)
