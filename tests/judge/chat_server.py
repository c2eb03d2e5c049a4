"""A stand-in for a server that speaks OpenAI's chat protocol, on loopback."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text, prompt_tokens=100, completion_tokens=5):
    """What OpenAI's API answers to POST /v1/chat/completions, as its reference describes it."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "stand-in",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def refusal(message, kind="invalid_request_error"):
    """What OpenAI's API answers with a status of 4xx."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class ChatServer:
    """`answer(body)` gives (status, content) of each request; `asked` has what came in, as (body,
    headers).
    """

    def __init__(self, answer):
        self.answer, self.asked = answer, []
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append((body, dict(self.headers), self.path))
                    status, content = outer.answer(body)
                if self.path.partition("?")[0] != "/v1/chat/completions":
                    status, content = 404, refusal(f"no such path: {self.path}")
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
