"""The web application: OpenAI's endpoints over the policies of one process."""

import asyncio
import contextlib
import hmac
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rlhf.engines.sampling import Sampling, sample_key
from rlhf.errors import UserError, did_you_mean
from rlhf.http_server import is_loopback
from rlhf.serve import protocol
from rlhf.serve.policies import Policy
from rlhf.serve.protocol import Answers, ApiError, ChatRequest, CompletionRequest
from rlhf.serve.worker import Event, Job, Worker

# bytes of a request
LONGEST_BODY = 8 * 2**20
# that answers have to end by themselves when the server is told to end
GRACE_SECONDS = 5
# temperatures below it are 0: the quotients of logits would overflow
LEAST_TEMPERATURE = 1e-5


@dataclass
class Service:
    """What the endpoints need: the policies by name, the worker that samples, the key that requests
    have to bring (None: none), and the tokens of an answer where a request does not say.
    """

    policies: dict[str, Policy]
    worker: Worker
    key: str | None = None
    max_response_length: int = 512
    created: int = field(default_factory=lambda: int(time.time()))

    def check_access(self, request: Request) -> None:
        """Raise ApiError unless the request brings the key, or, where there is none, comes to a name
        of this machine: a page of the web may give its own name this machine's address.
        """
        if self.key is None:
            host = request.url.hostname or ""
            if not is_loopback(host):
                raise ApiError(403, f"without a key no requests to '{host}'; see --api_key_env")
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        # in the same time for every wrong key
        is_right = hmac.compare_digest(given.strip().encode(), self.key.encode())
        if kind.lower() != "bearer" or not is_right:
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    def policy(self, name: str) -> Policy:
        """Return a policy by its name. Raises ApiError."""
        if name not in self.policies:
            served = ", ".join(self.policies)
            message = f"'{name}' is not served.{did_you_mean(name, self.policies)} Served: {served}"
            raise ApiError(404, message, "model", "model_not_found")
        return self.policies[name]


def create_app(service: Service) -> Starlette:
    """Return the application; its end closes the worker."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        yield
        await asyncio.to_thread(service.worker.close)

    app = Starlette(
        routes=[
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/chat/completions", partial(answer, kind=ChatRequest), methods=["POST"]),
            Route("/v1/completions", partial(answer, kind=CompletionRequest), methods=["POST"]),
            Route("/health", health),
        ],
        lifespan=lifespan,
        exception_handlers={
            ApiError: told,
            HTTPException: not_here,
            ClientDisconnect: disconnected,
            Exception: failed,
        },
        max_body_size=LONGEST_BODY,
    )
    app.state.service = service
    return app


class Server(uvicorn.Server):
    """A server that tells the clients that still wait when it ends."""

    def __init__(self, service: Service):
        self.service = service
        settings = uvicorn.Config(
            create_app(service),
            timeout_graceful_shutdown=2 * GRACE_SECONDS,
            # neither prompts nor keys are logged; `end` tells of each request
            access_log=False,
            log_level="error",
            server_header=False,
            ws="none",
        )
        super().__init__(settings)

    async def shutdown(self, sockets: list | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self.service.worker.stop)
        await super().shutdown(sockets)
        timer.cancel()


async def told(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status)


async def not_here(request: Request, error: HTTPException) -> Response:
    place = f"{request.method} {request.url.path}"
    return await told(request, ApiError(error.status_code, f"{place}: {error.detail}"))


async def disconnected(request: Request, error: ClientDisconnect) -> Response:
    """Answer a closed connection, which nobody reads."""
    return Response(status_code=408)


async def failed(request: Request, error: Exception) -> Response:
    return await told(request, ApiError(500, "the server failed, see its standard error"))


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def list_models(request: Request) -> Response:
    service = request.app.state.service
    service.check_access(request)
    return JSONResponse(protocol.models(service.policies, service.created))


async def one_model(request: Request) -> Response:
    service = request.app.state.service
    service.check_access(request)
    policy = service.policy(request.path_params["name"])
    return JSONResponse(protocol.models({policy.name: policy}, service.created)["data"][0])


async def answer(request: Request, *, kind: type[protocol.Request]) -> Response:
    """Answer a request of either endpoint: check it, put it in line, and stream or collect."""
    service: Service = request.app.state.service
    service.check_access(request)
    # a page of another site can send other types without being asked
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise ApiError(415, "the Content-Type has to be application/json")
    asked = protocol.parse(kind, await request.body())
    policy = service.policy(asked.model)
    prompts = asked.prompts_for(policy)

    # the worker is a thread, the endpoints are a loop
    events: asyncio.Queue[Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def notify(event: Event) -> None:
        # from the worker's thread, which may outlive the loop by a token
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(events.put_nowait, event)

    # refused before it waits in line
    job = job_of(asked, policy, prompts, service.max_response_length, notify)
    answers = Answers(asked, policy, prompts, secrets.token_hex(12), int(time.time()))
    service.worker.submit(job)
    if asked.stream:
        chunks = stream(answers, job, events)
        return StreamingResponse(chunks, media_type="text/event-stream")
    return JSONResponse(await collect(request, answers, job, events))


def job_of(
    asked: protocol.Request, policy: Policy, prompts: list[list[int]], usual: int, notify: Any
) -> Job:
    """Return the job of a request: `n` answers to each prompt. Raises ApiError where it is longer
    than the model's positions.
    """
    try:
        # one limit for all: the shortest room, unless the request says
        limit = min(policy.room(prompt, asked.limit, usual) for prompt in prompts)
    except UserError as error:
        where = "messages" if isinstance(asked, ChatRequest) else "prompt"
        raise ApiError(400, str(error), where, "context_length_exceeded") from None
    seed = asked.seed if asked.seed is not None else secrets.randbits(63)
    temperature = asked.temperature if asked.temperature >= LEAST_TEMPERATURE else 0.0
    rows, keys = [], []
    for prompt in prompts:
        for sample in range(asked.n):
            rows.append(prompt)
            # the same request with a seed gets the same answers, whatever else is asked
            keys.append(sample_key(seed, "serve", prompt, sample))
    return Job(
        policy=policy,
        prompts=rows,
        keys=keys,
        sampling=Sampling(limit, temperature, asked.top_k, asked.top_p),
        notify=notify,
        stops=asked.stops,
        streams=asked.stream,
    )


async def collect(
    request: Request, answers: Answers, job: Job, events: asyncio.Queue[Event]
) -> dict[str, Any]:
    """Wait for all answers, and end the job where the client leaves before."""
    # nobody waits any more for what a closed connection asked
    gone = asyncio.create_task(left(request))
    found: list[Event] = []
    began = time.monotonic()
    try:
        while answers.unfinished:
            getting = asyncio.create_task(events.get())
            await asyncio.wait({getting, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not getting.done():
                getting.cancel()
                raise ClientDisconnect
            found.append(getting.result())
            answers.take(found[-1])
        return answers.whole(found)
    finally:
        gone.cancel()
        end(job, answers, began)


async def left(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream(answers: Answers, job: Job, events: asyncio.Queue[Event]) -> AsyncIterator[str]:
    """Yield server-sent events; a client that leaves cancels this."""
    began = time.monotonic()
    try:
        for chunk in answers.first():
            yield line(chunk)
        while answers.unfinished:
            event = await events.get()
            answers.take(event)
            for chunk in answers.next(event):
                yield line(chunk)
        for chunk in answers.last():
            yield line(chunk)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield line(error.body)
    finally:
        end(job, answers, began)


def line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def end(job: Job, answers: Answers, began: float) -> None:
    """Cancel what is left of a job, and tell the terminal of it, without a word of its text."""
    job.is_cancelled = True
    counts = f"{answers.prompt_tokens} + {answers.completion_tokens} tokens"
    seconds = time.monotonic() - began
    how = "" if not answers.unfinished else ", cut off"
    now = time.strftime("%H:%M:%S")
    print(f"{now} {job.policy.name}: {counts}, {seconds:.1f} s{how}", file=sys.stderr, flush=True)
