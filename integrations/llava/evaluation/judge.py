"""A model that judges answers, behind any endpoint that speaks OpenAI's chat completions.

Replies are kept in a file as they come, so that none is asked, or paid for, twice: an evaluation that was interrupted
goes on, and one that is repeated gives the same numbers. One POST is all that is needed, for which the standard library
does.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from integrations.llava._files import json_lines
from integrations.llava._text import printable
from layerfuse.errors import FileAccessError, InputError, UserError

__all__ = ["Judge", "JudgeError"]

Message = Mapping[str, str]
"""``role`` and ``content``, as the endpoint takes them."""

_WORTH_ANOTHER_TRY = frozenset([408, 409, 425, 429])
_LONGEST_PAUSE = 60.0


class JudgeError(UserError, OSError):
    """A judge that gives no reply; those that it gave are kept."""


class Judge:
    """Asks a judge, several questions at once, and keeps its replies.

    Args:
        base_url: of the endpoint, ``https://…/v1``; ``/chat/completions`` is added.
        model: name of the judge as the endpoint knows it.
        replies: file for its replies, JSON lines; those in it are not asked again.
        key_variable: the environment variable that holds the key; None sends none, as for a server of one's own.
        options: more of the request's body, such as ``{"seed": 0}``; a value of None leaves a key out, as judges want
            that think before they reply: ``{"max_tokens": None, "max_completion_tokens": 4000, "temperature": None}``.
        num_tries: how often a request is sent before it counts as failed.
        num_parallel: requests at a time.
        timeout: seconds that a reply may take.
        pause: seconds before the second try; twice as many before each further one, or what the endpoint asks for.

    Raises:
        ValueError: if the address is none of HTTP, or the environment variable is not set.
        OSError: if the file cannot be written.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        replies: str | Path,
        *,
        key_variable: str | None = None,
        options: Mapping[str, Any] | None = None,
        num_tries: int = 6,
        num_parallel: int = 4,
        timeout: float = 180.0,
        pause: float = 1.0,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise InputError(f"the judge's address is {base_url!r}; give one that begins with https:// or http://.")
        if num_tries < 1 or num_parallel < 1:
            raise InputError(f"num_tries is {num_tries} and num_parallel {num_parallel}; give at least 1 for each.")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model = model
        self.num_parallel = num_parallel
        self._options = dict(options or {})
        self._num_tries, self._timeout, self._pause = num_tries, timeout, pause
        self._key = None if key_variable is None else _read_key(key_variable)
        self._replies = _Replies(Path(replies))
        self._served: set[str] = set()
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def name(self) -> str:
        """The judge for tables: the model asked for, and in brackets, once asked, who replied under another name."""
        others = sorted(self._served - {self.model, ""})
        return f"{self.model} ({', '.join(others)})" if others else self.model

    def ask(self, messages: Sequence[Message], *, temperature: float, max_tokens: int, attempt: int = 0) -> str:
        """Return the judge's reply to a conversation, from the file if it is there.

        Args:
            messages: the conversation.
            temperature: of the judge's choices.
            max_tokens: longest reply.
            attempt: tells apart requests that are the same, where another reply is wanted.

        Raises:
            OSError: a `JudgeError`, if the endpoint refuses the request, or gives no reply in all tries.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [dict(message) for message in messages],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        body = {key: value for key, value in (body | self._options).items() if value is not None}
        what = json.dumps([self.url, body, attempt], sort_keys=True)
        key = hashlib.sha256(what.encode("utf-8", "surrogatepass")).hexdigest()
        kept = self._replies.found.get(key)
        text, served = kept or self._request(json.dumps(body).encode())
        if kept is None:
            self._replies.keep(key, text, served)
        self._served.add(served)
        return text

    def _request(self, body: bytes) -> tuple[str, str]:
        fault = ""
        for number in range(self._num_tries):
            wait = min(_LONGEST_PAUSE, self._pause * 2**number)
            try:
                return self._send(body)
            except urllib.error.HTTPError as error:
                fault = self._told(error)
                if error.code not in _WORTH_ANOTHER_TRY and error.code < 500:
                    raise JudgeError(
                        f"the judge {self.model} at {self.url} refuses a request ({fault}); mend its name, address, "
                        "key or options. Replies so far are kept."
                    ) from error
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (OSError, HTTPException, ValueError) as error:
                fault = printable(str(error) or type(error).__name__)
            if number + 1 < self._num_tries:
                time.sleep(wait)
        raise JudgeError(
            f"the judge {self.model} at {self.url} gave no reply in {self._num_tries} tries ({fault}). Replies so far "
            "are kept: start again when it answers."
        )

    def _send(self, body: bytes) -> tuple[str, str]:
        """Send a request once; ValueError for a reply that is none."""
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        with self._opener.open(request, timeout=self._timeout) as response:
            content = json.loads(response.read())
        try:
            choice = content["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"a reply without choices: {printable(json.dumps(content))}") from error
        if not isinstance(text, str) or not text.strip():
            reason = choice.get("finish_reason") if isinstance(choice, dict) else None
            raise InputError(f"an empty reply, finish_reason {reason!r}; a judge that thinks first needs more tokens")
        return text, str(content.get("model") or "")

    def _told(self, error: urllib.error.HTTPError) -> str:
        """What the endpoint says about a failure, without the key."""
        try:
            said = error.read().decode("utf-8", "replace")
        except (OSError, HTTPException):
            said = ""
        told = f"{error.code} {error.reason}: {said}" if said else f"{error.code} {error.reason}"
        return printable(told.replace(self._key, "…") if self._key else told)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes no other address, to which the key would go, too."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Replies:
    """The file of replies; a line that a killed process left half written is cut off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.found: dict[str, tuple[str, str]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        except OSError as error:
            raise FileAccessError(
                f"{path} cannot be written ({error.strerror or error}); the judge's replies are kept there. Give "
                "another place."
            ) from error
        for number, row in json_lines(path):
            if not all(isinstance(row.get(key), str) for key in ("key", "reply", "model")):
                raise InputError(f"{path}, line {number} is no reply of a judge; move the file away.")
            self.found[row["key"]] = (row["reply"], row["model"])

    def keep(self, key: str, text: str, served: str) -> None:
        line = json.dumps({"key": key, "model": served, "reply": text}) + "\n"
        with self._lock:
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                raise FileAccessError(f"{self._path} cannot be written ({error.strerror or error}).") from error
            self.found[key] = (text, served)


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"the environment variable {variable} is not set; put the judge's key there, or name another.")
    if not key.isascii() or not key.isprintable():
        raise InputError(f"the environment variable {variable} holds characters that no key has; put the key there.")
    return key


def _seconds(text: str | None) -> float:
    """What Retry-After says, at most a minute; 0 where it is a date, or nothing."""
    return min(_LONGEST_PAUSE, float(text)) if text is not None and text.isdigit() else 0.0
