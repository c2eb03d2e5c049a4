"""`rlhf serve RUN [RUN ...]`: policies on a port of this machine, in OpenAI's protocol."""

import contextlib
import signal
from dataclasses import dataclass

from rlhf.config import option
from rlhf.errors import UserError
from rlhf.http_client import read_token
from rlhf.http_server import is_loopback, listen, local_url


@dataclass
class ServeConfig:
    """Serve policies to programs that speak to OpenAI: each run by its folder's name, and the base
    of adapters by its own. Adapters of one base share its weights.
    """

    runs: list[str] = option(help="folders of runs, adapters or models")
    host: str = option(
        "127.0.0.1", "the address to listen on; any but this machine's own needs a key"
    )
    port: int = option(8000, "the port to listen on", low=1, high=65535)
    api_key_env: str | None = option(
        None, "environment variable with the key that requests have to bring; default: no key"
    )
    max_response_length: int = option(
        512, "tokens of an answer where a request gives no max_tokens", low=1
    )
    batch_size: int = option(64, "answers sampled together", low=1)

    def validate(self) -> None:
        if not self.runs:
            raise UserError("'runs' is empty: give at least one run")
        if not is_loopback(self.host) and self.api_key_env is None:
            raise UserError(
                f"'host' is {self.host}, which others can reach: give the name of an environment variable that holds "
                "a key, for example --api_key_env RLHF_API_KEY"
            )
        # before anything is loaded
        read_token(self.api_key_env, "'api_key_env'")


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM, which end the answers that are under way."""
    from rlhf.serve.app import Server, Service
    from rlhf.serve.policies import load
    from rlhf.serve.worker import Worker

    # the port is taken before the weights are loaded, which takes minutes
    with contextlib.closing(listen(config.host, config.port)) as listener:
        policies = {policy.name: policy for policy in load(config.runs, with_bases=True)}
        service = Service(
            policies,
            Worker(config.batch_size),
            read_token(config.api_key_env, "'api_key_env'"),
            config.max_response_length,
        )
        url = local_url(config.host, config.port)
        print(f"serving {', '.join(policies)} on {url}/v1 (Ctrl-C ends)", flush=True)
        # uvicorn raises what it caught once more at its end; a clean one has exit code 0
        signal.signal(signal.SIGTERM, lambda *_: None)
        with contextlib.suppress(KeyboardInterrupt):
            Server(service).run(sockets=[listener])
