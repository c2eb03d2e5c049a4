"""Requests and answers in OpenAI's form; what is not supported is refused by name."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf.data.encode import encode_prompt
from rlhf.data.records import Message, Prompt, RecordError
from rlhf.errors import did_you_mean
from rlhf.serve.policies import Policy
from rlhf.serve.worker import INCOMPLETE, Event

# parameters that are accepted with these values, with which they change nothing
NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "echo": (False,),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "suffix": ("",),
}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ApiError(Exception):
    """An error that the caller is told, with its HTTP status."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status = status
        # clients retry after errors of the server alone
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code},
        }


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class Request(BaseModel):
    """What both endpoints take. `top_k` is vLLM's, the rest OpenAI's; `user` changes nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    stop: str | Annotated[list[str], Field(max_length=16)] = ""
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        return [stop for stop in stops if stop]

    @property
    def limit(self) -> int | None:
        """The tokens that an answer may have, where the request says."""
        return self.max_tokens

    def prompts_for(self, policy: Policy) -> list[list[int]]:
        """Return the ids of each prompt. Raises ApiError."""
        raise NotImplementedError


class ChatRequest(Request):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def prompts_for(self, policy: Policy) -> list[list[int]]:
        messages = [_message(message, index) for index, message in enumerate(self.messages)]
        try:
            prompt = Prompt(prompt=messages).prompt
            return [encode_prompt(policy.tokenizer, prompt)]
        except RecordError as error:
            # the caller calls them messages, a record calls them its prompt
            message = str(error).replace("field 'prompt': ", "")
            raise ApiError(400, f"'messages': {message}", "messages") from None


class CompletionRequest(Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: None = None

    def prompts_for(self, policy: Policy) -> list[list[int]]:
        given = self.prompt
        # one text, or the ids of one
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        prompts = []
        for text in given:
            ids = policy.tokenizer(text).input_ids if isinstance(text, str) else text
            prompts.append(list(ids))
        if not prompts or not all(prompts):
            raise ApiError(400, "'prompt' has no tokens", "prompt")
        vocabulary = policy.model.get_input_embeddings().num_embeddings
        for ids in prompts:
            # on a GPU an id beyond the embeddings would end the process
            if min(ids) < 0 or max(ids) >= vocabulary:
                raise ApiError(400, f"'prompt': token ids are from 0 to {vocabulary - 1}", "prompt")
        return prompts


def _message(message: dict[str, Any], index: int) -> Message:
    """Return a message as the chat template reads it. Raises ApiError for what is not text."""
    place = f"messages[{index}]"
    # answers come back with all the fields that were empty in them
    given = {name: value for name, value in message.items() if value not in (None, [], {})}
    role, content = given.pop("role", None), given.pop("content", None)
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise ApiError(400, f"'{place}.role' is {role!r}, expected one of {known}", "messages")
    if given:
        raise ApiError(400, f"'{place}.{next(iter(given))}' is not supported", "messages")
    if isinstance(content, list):
        content = _joined(content)
    if not isinstance(content, str):
        raise ApiError(400, f"'{place}.content' has to be text, or parts of text", "messages")
    return {"role": ROLES[role], "content": content}


def _joined(parts: list[Any]) -> str | None:
    """Return the parts of a content as one text; None where one of them is not text."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "".join(texts)


def parse(kind: type[Request], body: bytes) -> Request:
    """Return a request. Raises ApiError with the parameter that is wrong or not supported."""
    try:
        given = json.loads(body)
        # half of a surrogate pair can be written in JSON, and is no text
        json.dumps(given, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON of text ({error})") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body has to be an object")
    # null is what was not given
    given = {name: value for name, value in given.items() if value is not None}
    for name, values in NEUTRAL.items():
        if name not in kind.model_fields and given.get(name) in values:
            del given[name]
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
    name = str(problem["loc"][0])
    if problem["type"] in ("extra_forbidden", "none_required"):
        nested = ".".join(map(str, problem["loc"]))
        hint = did_you_mean(name, kind.model_fields)
        # no list of what is: clients look for names of parameters in messages, to leave those out
        message = f"'{nested}' is not supported here.{hint}"
        raise ApiError(400, message, name, "unsupported_parameter")
    if problem["type"] == "missing":
        raise ApiError(400, f"'{name}' is missing", name)
    raise ApiError(400, f"'{name}': {problem['msg']}", name)


def models(policies: dict[str, Policy], created: int) -> dict[str, Any]:
    """Return the list of what is served; an adapter has its base as `parent`, as with vLLM."""
    cards = []
    for policy in policies.values():
        card = {"id": policy.name, "object": "model", "created": created, "owned_by": "rlhf"}
        cards.append({**card, "parent": policy.base, "max_model_len": policy.limit})
    return {"object": "list", "data": cards}


class Answers:
    """Puts the events of one request into the objects of its endpoint."""

    def __init__(
        self, asked: Request, policy: Policy, prompts: list[list[int]], name: str, now: int
    ):
        self.asked, self.policy = asked, policy
        self.is_chat = isinstance(asked, ChatRequest)
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        self.head = {"id": f"{prefix}-{name}", "created": now, "model": policy.name}
        self.prompt_tokens = sum(map(len, prompts))
        self.completion_tokens = 0
        self.unfinished = len(prompts) * asked.n

    def take(self, event: Event) -> None:
        """Count an event. Raises ApiError for one that tells of an error."""
        if event.error:
            raise ApiError(503, event.error)
        self.completion_tokens += len(event.tokens)
        # each choice ends once
        self.unfinished -= event.finish is not None

    @property
    def usage(self) -> dict[str, int]:
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {**counts, "total_tokens": sum(counts.values())}

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """Return the answer that is not streamed; one event for each choice."""
        choices = []
        for event in sorted(events, key=lambda event: event.answer):
            message = {"role": "assistant", "content": event.text, "refusal": None}
            content = {"message": message} if self.is_chat else {"text": event.text}
            choices.append(self._choice(event, content))
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage}

    def first(self) -> list[dict[str, Any]]:
        """Return the chunks that begin a stream: the role of each choice of a chat."""
        if not self.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(Event(answer), delta) for answer in range(self.unfinished)]

    def next(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the chunks of an event: its text, then the end of its choice without any."""
        delta = {"content": event.text} if event.text or event.tokens else {}
        if delta:
            news = Event(event.answer, event.text, event.tokens)
            yield self._chunk(news, delta)
        if event.finish:
            yield self._chunk(Event(event.answer, finish=event.finish), {})

    def last(self) -> list[dict[str, Any]]:
        """Return the chunk with the usage, if it was asked for."""
        options = self.asked.stream_options
        if options is None or not options.include_usage:
            return []
        return [{**self.head, "object": self._chunk_kind, "choices": [], "usage": self.usage}]

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _chunk(self, event: Event, delta: dict[str, Any]) -> dict[str, Any]:
        content = {"delta": delta} if self.is_chat else {"text": event.text}
        choice = self._choice(event, content)
        return {**self.head, "object": self._chunk_kind, "choices": [choice]}

    def _choice(self, event: Event, content: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": event.answer, **content, "finish_reason": event.finish}
        return {**choice, "logprobs": self._logprobs(event)}

    def _logprobs(self, event: Event) -> dict[str, Any] | None:
        """Return log-probabilities of the sampled distribution, of all tokens but what ends it."""
        if not self.asked.logprobs or not event.tokens:
            return None
        entries = []
        for token, logprob, text in event.tokens:
            if token in self.policy.stop_ids:
                continue
            spelt = None if INCOMPLETE in text else list(text.encode())
            entries.append({"token": text, "logprob": logprob, "bytes": spelt, "top_logprobs": []})
        return {"content": entries, "refusal": None}
