"""Ask a language model many questions through OpenAI's chat protocol: nothing twice, several at a
time, with tokens and cost counted.
"""

import concurrent.futures
import hashlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.files import cache_folder
from rlhf.http_client import Refused, Service, ask, read_token
from rlhf.judge.prompts import Question, question
from rlhf.judge.spec import EndpointSpec
from rlhf.text import say_once

NAME = "judgement"
# statuses of servers that do not know a field of the request, or what is in it
UNKNOWN_FIELD = (400, 404, 415, 422)
# shown with so many questions or more
PROGRESS_FROM = 20


@dataclass(frozen=True)
class Reply:
    """What the model said to one question.

    value: None where it could not be read, also after it was asked for the right form once.
    text: the last answer. Tokens are of all requests of the question.
    """

    value: float | None
    text: str
    repaired: bool
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Usage:
    """Counts since a judge was made: questions asked, and those whose answer was known; of the
    asked ones repaired answers, tokens and cost (None without prices); of all, unreadable answers.
    """

    asked: int = 0
    cached: int = 0
    repaired: int = 0
    unreadable: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None


class AnswerFile:
    """Answers by key, one JSON object a line, that several processes may add to.

    read: makes what is known under a key from its row, in which the key itself is left out.
    """

    def __init__(self, path: Path, read: Callable[[dict[str, Any]], Any]):
        self.path = path
        self.known: dict[str, Any] = {}
        self._lock = threading.Lock()
        lines = path.read_bytes().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError:
                # half a line, left by a kill; nothing but such a line is another kind of file
                if number > 1:
                    continue
                row = {}
            try:
                key = row.pop("key")
                self.known[key] = read(row)
            except (KeyError, TypeError, ValueError, AttributeError):
                raise UserError(
                    f"{path}, line {number}: not an answer of a judge. Delete the line, or the "
                    "file, and it is asked for again"
                ) from None

    def add(self, key: str, answer: Any, row: dict[str, Any]) -> None:
        """Keep an answer, in the file as `row`. A half line left by a kill is ended first."""
        line = json.dumps({"key": key, **row}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self.known[key] = answer
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                if file.tell():
                    file.seek(-1, 2)
                    line = line if file.read(1) == b"\n" else b"\n" + line
                file.write(line)


@dataclass
class Client:
    """A model behind an endpoint, asked one kind of question.

    where: how messages call it. default_cache: the file of answers where the specification names
    none.
    """

    spec: EndpointSpec
    where: str
    default_cache: Path | None = None
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self):
        spec = self.spec
        self.question: Question = question(spec)
        address, mark, query = spec.openai.partition("?")
        self.service = Service(
            self.where,
            # the path that is added comes before the query
            f"{address.rstrip('/')}/chat/completions{mark}{query}",
            spec.timeout,
            spec.retries,
            read_token(spec.token_env, self.where),
            remedy="raise `timeout` or `retries`, or lower `in_flight`",
        )
        # by all that decides the answers: two judges share no file by chance
        cache = spec.cache or self.default_cache or cache_folder() / "judge" / self._file_name()
        self.answers = AnswerFile(Path(cache), lambda row: Reply(**row))
        # what the server has refused is not sent again
        self.sends_schema = True
        self.limit_name = "max_tokens"

    @property
    def name(self) -> str:
        """The model's name, and a fingerprint of all that decides its answers."""
        return f"{self.spec.model} ({self._fingerprint()[:8]})"

    def _fingerprint(self) -> str:
        """Return a hash of model, address, template, guide and sampling."""
        decides = [self.service.address, self._settings(), self.question.schema]
        decides += [self.question.template, self.question.guide]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def _file_name(self) -> str:
        return (
            f"{re.sub(r'[^A-Za-z0-9._-]+', '-', self.spec.model)}-{self._fingerprint()[:16]}.jsonl"
        )

    def _settings(self) -> dict[str, Any]:
        """Return the fields of a request that decide how is sampled."""
        spec = self.spec
        settings = {"model": spec.model, "max_tokens": spec.max_tokens, **spec.extra_body}
        if spec.temperature is not None:
            settings["temperature"] = spec.temperature
        return settings

    def ask(self, texts: Sequence[str], progress: str | None = None) -> list[Reply]:
        """Return the reply to each prompt, in order; equal ones are asked once, known ones not at
        all. Raises UserError when the service refuses or does not answer.
        """
        # what decides an answer is in its key: another temperature is another question
        head = [self.service.address, self._settings(), self.question.schema]
        keys = []
        for text in texts:
            content = json.dumps([*head, text], sort_keys=True, ensure_ascii=False)
            keys.append(hashlib.sha256(content.encode()).hexdigest()[:32])
        missing = {}
        for key, text in zip(keys, texts, strict=True):
            if key not in self.answers.known:
                missing[key] = text
        self.usage.asked += len(missing)
        self.usage.cached += len(texts) - len(missing)
        if missing:
            self._ask_missing(missing, progress)
        replies = [self.answers.known[key] for key in keys]
        self.usage.unreadable += sum(reply.value is None for reply in replies)
        return replies

    def _ask_missing(self, missing: dict[str, str], progress: str | None) -> None:
        """Ask for what is not known and keep it as it comes; the first that fails ends the rest."""
        from tqdm import tqdm

        stop = threading.Event()
        # threads: the time goes into waiting for the server
        pool = concurrent.futures.ThreadPoolExecutor(self.spec.in_flight)
        hidden = progress is None or len(missing) < PROGRESS_FROM
        try:
            with tqdm(total=len(missing), desc=progress, mininterval=2, disable=hidden) as bar:
                requests = {}
                for key, text in missing.items():
                    requests[pool.submit(self._reply, text, stop)] = key
                for request in concurrent.futures.as_completed(requests):
                    reply = request.result()
                    self.answers.add(requests[request], reply, asdict(reply))
                    self._count(reply)
                    if self.usage.cost is not None:
                        bar.set_postfix_str(f"cost {self.usage.cost:.4g}", refresh=False)
                    bar.update()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)

    def _count(self, reply: Reply) -> None:
        """Add what a question took to the usage."""
        usage, spec = self.usage, self.spec
        usage.repaired += reply.repaired
        usage.prompt_tokens += reply.prompt_tokens
        usage.completion_tokens += reply.completion_tokens
        if spec.input_price is not None or spec.output_price is not None:
            # prices are of a million tokens
            spent = usage.prompt_tokens * (spec.input_price or 0)
            spent += usage.completion_tokens * (spec.output_price or 0)
            usage.cost = spent / 1e6

    def _reply(self, text: str, stop: threading.Event) -> Reply:
        """Return the reply to one prompt. An answer of another form is asked for once more, with
        what is wrong with it.
        """
        messages = [{"role": "user", "content": text}]
        tokens = [0, 0]
        for attempt in (1, 2):
            answer, spent = self._complete(messages, stop)
            tokens = [total + more for total, more in zip(tokens, spent, strict=True)]
            try:
                value = self.question.value(answer)
                return Reply(value, answer, attempt == 2, *tokens)
            except ValueError as error:
                asked = f"Your answer cannot be read: {error}. {self.question.wanted()}"
            messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": asked})
        return Reply(None, answer, True, *tokens)

    def _complete(self, messages: list[dict], stop: threading.Event) -> tuple[str, list[int]]:
        """Return the model's text and the tokens of prompt and completion.

        A server that refuses a field that newer or older ones know is asked without it.
        """
        while True:
            sends_schema, limit_name = self.sends_schema, self.limit_name
            body = self._settings() | {"messages": messages}
            body[limit_name] = body.pop("max_tokens")
            if sends_schema:
                form = {"name": NAME, "strict": True, "schema": self.question.schema}
                body["response_format"] = {"type": "json_schema", "json_schema": form}
            try:
                answer = ask(self.service, body, "judge one question", stop)
            except Refused as error:
                if not self._leaves_out(error, sends_schema, limit_name):
                    raise
                continue
            return self._content(answer)

    def _leaves_out(self, error: Refused, sends_schema: bool, limit_name: str) -> bool:
        """Say whether a refusal is about a field that can be left out or renamed; remember it."""
        # servers say which field they do not know in words alone
        words = str(error).lower()
        if error.status not in UNKNOWN_FIELD:
            return False
        if limit_name == "max_tokens" and "max_completion_tokens" in words:
            self.limit_name = "max_completion_tokens"
            return True
        if sends_schema and re.search("response_format|schema|grammar|structured", words):
            self.sends_schema = False
            say_once(f"{self.service} takes no JSON schema: answers are read from its text")
            return True
        return False

    def _content(self, answer: Any) -> tuple[str, list[int]]:
        """Return the text and the tokens of a completion. Raises UserError where it is none."""
        try:
            content = answer.json()
            # null where the model refuses to answer, or has only called a tool
            text = content["choices"][0]["message"]["content"] or ""
            usage = content.get("usage") or {}
            tokens = [int(usage.get(f"{part}_tokens") or 0) for part in ("prompt", "completion")]
            return self.service.without_token(str(text)), tokens
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise UserError(
                f"{self.service} answered {answer.excerpt(self.service)}, expected a chat completion "
                "with choices[0].message.content. Does the address end in /v1?"
            ) from None
