"""A judge on this machine: an OpenAI-compatible endpoint that notes requests and fails as it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[Mapping[str, Any]], str]


class JudgeServer:
    """What a judge was asked, and what it does next.

    `faults` are taken one a request: a status, headers and a body for a failure; "hang up"; None to answer.
    """

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.served = "judge-2026"
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[Any] = []
        self.lock = threading.Lock()
        self.url = ""

    @property
    def contents(self) -> list[str]:
        return [request["messages"][-1]["content"] for request in self.requests]


@contextmanager
def judge_server(reply: Reply) -> Iterator[JudgeServer]:
    judge = JudgeServer(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.requests.append({"path": self.path, **body})
                judge.headers.append(dict(self.headers))
                fault = judge.faults.pop(0) if judge.faults else None
            if fault == "hang up":
                self.close_connection = True
                return
            status, headers, content = fault or (200, {}, answer(judge, body))
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(judge: JudgeServer, body: Mapping[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": judge.reply(body)}
    return {"model": judge.served, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def failure(status: int, text: str = "later", **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, text.encode()


def turns(*texts: str) -> Sequence[Mapping[str, str]]:
    return [{"role": "user", "content": text} for text in texts]
