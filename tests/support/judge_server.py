"""A judge for tests: an OpenAI-compatible server on this machine, which replies as a test says, faults included."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# What was asked, by its parts, and how often it was asked before -> (status, body, seconds before it).
Reply = Callable[[dict[str, str], int], tuple[int, bytes, float]]


class JudgeServer:
    """What it was asked, and where it listens."""

    def __init__(self, reply: Reply) -> None:
        self.reply, self.requests, self.keys, self.at_once, self.most_at_once = reply, [], [], 0, 0
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def _handler(outer) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                parts = parts_of(asked["messages"][1]["content"])
                with outer.lock:
                    before = outer.requests.count(parts)
                    outer.requests.append(parts)
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                status, body, seconds = outer.reply(parts, before)
                outer.ended.wait(seconds)
                with outer.lock:
                    outer.at_once -= 1
                try:
                    self.send_response(status)
                    if status in (301, 302, 307):
                        self.send_header("Location", f"{outer.url}/elsewhere/chat/completions")
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except OSError:
                    pass  # whoever asked has gone

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def parts_of(prompt: str) -> dict[str, str]:
    """Question, correct answer and answer, as the judge reads them."""
    question, truth, answer = prompt.split("\n\n", 2)
    return {
        "question": question.removeprefix("Question: "),
        "truth": truth.removeprefix("Correct answer: "),
        "answer": answer.removeprefix("The model's answer: "),
    }


def says(text: object) -> bytes:
    """A completion with this text."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def whether_equal(parts: dict[str, str], _: int) -> tuple[int, bytes, float]:
    """Yes if the answer is the true one, word for word."""
    return 200, says("Yes." if parts["answer"] == parts["truth"] else "no"), 0.0


@contextmanager
def judge_server(reply: Reply = whether_equal) -> Iterator[JudgeServer]:
    server = JudgeServer(reply)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join()
