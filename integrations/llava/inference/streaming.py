"""An answer's text while it is being written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextIteratorStreamer

__all__ = ["StopWhenSet", "WholeTextStreamer", "stream_text"]


class WholeTextStreamer(TextIteratorStreamer):
    """Gives pieces of text which joined are exactly the answer; `decode` makes it of the ids so far.

    transformers' own forgets the text in front of a line break, and with it the blank that SentencePiece-like
    tokenizers drop at the beginning of what they decode.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, decode: Callable[[Sequence[int]], str]) -> None:
        super().__init__(tokenizer, skip_prompt=True)
        self._decode = decode
        self._sent = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt's (1, T) ids, which are skipped, or the next (1,) id."""
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.token_cache.extend(value.tolist())
        # The bytes of a character may come in several tokens; until it is whole it decodes as U+FFFD.
        self._send(self._decode(self.token_cache).rstrip("\ufffd"))

    def end(self) -> None:
        """Send what was held back, and the signal that ends the iteration."""
        self._send(self._decode(self.token_cache))
        self.on_finalized_text("", stream_end=True)

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self.on_finalized_text(text[self._sent :])
            self._sent = len(text)


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
