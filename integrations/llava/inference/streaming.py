"""An answer's text while it is being written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextIteratorStreamer

__all__ = ["StopAtTexts", "StopWhenSet", "WholeTextStreamer", "before_texts", "stream_text"]


class WholeTextStreamer(TextIteratorStreamer):
    """Gives pieces of text which joined are exactly the answer; `decode` makes it of the ids so far.

    The beginning of a text at which the answer would end is held back until it is known to be none. transformers' own
    forgets the text in front of a line break, and with it the blank that SentencePiece-like tokenizers drop at the
    beginning of what they decode.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self._decode, self._stop = decode, stop
        self._sent = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's (1, T) ids, which are skipped, or the next (1,) id."""
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.token_cache.extend(value.tolist())
        # The bytes of a character may come in several tokens; until it is whole it decodes as U+FFFD.
        text = self._decode(self.token_cache).rstrip("\ufffd")
        held = max((_begun(text, stop) for stop in self._stop), default=0)
        self._send(text[: len(text) - held].rstrip() if held else text)

    def end(self) -> None:
        """Send what was held back, and the signal that ends the iteration."""
        self._send(self._decode(self.token_cache))
        self.on_finalized_text("", stream_end=True)

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self.on_finalized_text(text[self._sent :])
            self._sent = len(text)


def _begun(text: str, stop: str) -> int:
    """Number of characters at the end of a text with which another begins."""
    return next((count for count in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:count])), 0)


def before_texts(text: str, stop: Sequence[str]) -> str:
    """The part of a text in front of the first of some others."""
    return text[: min((place for own in stop if (place := text.find(own)) >= 0), default=len(text))]


class StopAtTexts(StoppingCriteria):
    """Ends each answer of a batch once it holds one of some texts.

    transformers' own `stop_strings` would also stop where a text begins in the prompt, and looks at tokens only.

    Args:
        stop: the texts.
        prompt_length: positions in front of the answers.
        decode: makes an answer's text of its ids.
    """

    def __init__(self, stop: Sequence[str], prompt_length: int, decode: Callable[[Sequence[int]], str]) -> None:
        self._stop, self._start, self._decode = stop, prompt_length, decode

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return (B,) whether each row is done."""
        answers = [self._decode(row) for row in input_ids[:, self._start :].tolist()]
        done = [any(stop in answer for stop in self._stop) for answer in answers]
        return torch.tensor(done, device=input_ids.device)


class StopWhenSet(StoppingCriteria):
    """Ends generation after the next token once another thread has set the event."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return (B,) whether each row is done."""
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


def stream_text(
    generate: Callable[[WholeTextStreamer, StopWhenSet], Any], streamer: WholeTextStreamer
) -> Generator[str, None, None]:
    """Pieces of the text that `generate` writes in a thread, with the streamer and stopping criterion that it is given.

    Closing the iterator, or an exception at its place (such as Ctrl-C), stops the generation.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, streamer, StopWhenSet(stop))
        # Also if generation failed before it could say that it has ended.
        running.add_done_callback(lambda _: streamer.text_queue.put(streamer.stop_signal))
        try:
            yield from streamer
            running.result()
        finally:
            stop.set()
