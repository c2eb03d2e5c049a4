"""A server with the part of vLLM's protocol that `rlhf.engines.vllm` uses, over a tiny base: it
loads adapters with PEFT from the files it is pointed to, and samples by a loop over whole passes.
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel

from rlhf.engines.sampling import restrict
from rlhf.model.loading import load_model


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, asked):
        with self.server.counting():
            status, content = self.server.handle(self.path, asked, dict(self.headers))
        body = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """`asked` holds (path, body) of every request. `faults` maps a path to functions of the right
    (status, answer), each used once: they give what is answered instead.
    """

    request_queue_size = 64

    def __init__(self, base: str, max_model_len: int = 512, max_lora_rank: int = 16):
        super().__init__(("127.0.0.1", 0), Handler)
        self.base, self.max_model_len, self.max_lora_rank = base, max_model_len, max_lora_rank
        self.url = f"http://127.0.0.1:{self.server_port}"
        # name -> folder, and the model with all of them
        self.adapters: dict[str, str] = {}
        self.model = load_model(base).model
        self.asked, self.faults, self.headers = [], {}, []
        self.lock = threading.Lock()
        # requests at the same time, now and at most
        self.in_flight, self.most_in_flight = 0, 0
        self.allows_updates = True
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        # a client that gave up
        pass

    @contextlib.contextmanager
    def counting(self):
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1

    def bodies(self, path: str) -> list[dict]:
        return [body for found, body in self.asked if found == path]

    def handle(self, path, body, headers):
        with self.lock:
            self.asked.append((path, body))
            self.headers.append(headers)
            routes = {"/v1/models": self.models, "/v1/completions": self.complete}
            if self.allows_updates:
                routes["/v1/load_lora_adapter"] = self.load
                routes["/v1/unload_lora_adapter"] = self.unload
            right = routes[path](body) if path in routes else (404, {"detail": "Not Found"})
            faults = self.faults.get(path)
            fault = faults.pop(0) if faults else None
        return fault(*right) if fault else right

    def models(self, body):
        cards = [{"id": self.base, "root": self.base, "parent": None}]
        cards += [{"id": n, "root": f, "parent": self.base} for n, f in self.adapters.items()]
        return 200, {"object": "list", "data": cards}

    def load(self, body):
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters and not body.get("load_inplace"):
            return 400, error(f"The lora adapter '{name}' has already been loaded.")
        if not (folder / "adapter_config.json").is_file():
            return 404, error(f"No adapter found for {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            return 500, error(f"LoRA rank {rank} is greater than max_lora_rank")
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(str(folder), name)
        else:
            self.model = PeftModel.from_pretrained(self.model, str(folder), name)
        self.model.eval()
        self.adapters[name] = str(folder)
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body):
        name = body["lora_name"]
        if name not in self.adapters:
            return 404, error(f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    @torch.no_grad()
    def complete(self, body):
        name, prompt = body["model"], body["prompt"]
        if name != self.base and name not in self.adapters:
            return 404, error(f"The model `{name}` does not exist.")
        limit = min(body["max_tokens"], self.max_model_len - len(prompt))
        stops = set(body.get("stop_token_ids", []))
        luck = torch.Generator().manual_seed(body["seed"])
        ids, logprobs = [], []
        with self.using(name):
            while len(ids) < limit and not (ids and ids[-1] in stops):
                logits = self.model(torch.tensor([prompt + ids]), use_cache=False).logits[:, -1]
                token, logprob = draw(logits.float(), body, luck)
                ids.append(token)
                logprobs.append(logprob)
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if ids and ids[-1] in stops else "length",
            "logprobs": {"token_logprobs": logprobs, "tokens": [], "top_logprobs": []},
        }
        if body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        return 200, {"object": "text_completion", "model": name, "choices": [choice]}

    def using(self, name):
        if name != self.base:
            self.model.set_adapter(name)
            return contextlib.nullcontext()
        has_adapters = isinstance(self.model, PeftModel)
        return self.model.disable_adapter() if has_adapters else contextlib.nullcontext()


def draw(logits, body, luck):
    """Return a token of logits (1, V) and its log-probability, as --logprobs-mode processed_logprobs
    gives it.
    """
    if body["temperature"] == 0:
        scaled, token = logits, logits.argmax(-1)
    else:
        scaled = restrict(logits / body["temperature"], body["top_k"], body["top_p"])
        token = torch.multinomial(scaled.softmax(-1), 1, generator=luck)[0]
    return int(token), float(scaled.log_softmax(-1)[0, token])


def error(message: str) -> dict:
    return {"error": {"message": message, "type": "BadRequestError", "code": 400}}
