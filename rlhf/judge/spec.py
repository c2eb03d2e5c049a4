"""Options of a language model that judges, behind an endpoint that speaks OpenAI's chat protocol.

{openai: https://api.openai.com/v1, model: gpt-5-mini, token_env: OPENAI_API_KEY}
{openai: http://localhost:8000/v1, model: qwen, guide: configs/voices/shop.yaml, explain: true}
"""

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from rlhf.errors import UserError, near_file
from rlhf.http_client import check_url, looks_like_key, read_token
from rlhf.validation import Count, Number, Spec

# of the request's body: these have options of their own
OWN_FIELDS = ("model", "messages", "temperature", "response_format", "stream", "n")


class EndpointSpec(Spec):
    """Where the judge is, how it is asked, and what its tokens cost; times in seconds."""

    openai: str = Field(min_length=1, description="address up to and with /v1")
    model: str = Field(min_length=1, description="the model's name at that address")
    token_env: Any = Field(None, description="the environment variable with the key")
    template: str | None = Field(None, description="file with the prompt; default: the shipped one")
    guide: str | None = Field(None, description="file with a rubric, or a brand voice (.yaml)")
    explain: bool = Field(False, description="ask for a sentence of reasons before the verdict")
    temperature: Number | None = Field(0.0, ge=0, description="null: the server's")
    max_tokens: Count = Field(512, ge=1, description="of an answer, reasoning included")
    extra_body: dict[str, Any] = Field({}, description="further fields of each request")
    timeout: Number = Field(120, gt=0)
    retries: Count = Field(5, ge=0)
    in_flight: Count = Field(8, ge=1, description="requests at a time")
    cache: str | None = Field(None, description="file of answers; default: in the cache folder")
    input_price: Number | None = Field(None, ge=0, description="of a million tokens")
    output_price: Number | None = Field(None, ge=0, description="of a million tokens")

    @field_validator("extra_body")
    @classmethod
    def _check_fields(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for name in extra:
            if name in OWN_FIELDS:
                raise ValueError(f"'{name}' is set by the judge itself")
            # it would be written into config.yaml
            if looks_like_key(name):
                raise ValueError(f"'{name}' looks like a key: name its variable as token_env")
        return extra

    def check(self, where: str) -> None:
        """Raise UserError, naming `where`, for what the types of the fields cannot tell."""
        check_url(self.openai, where)
        read_token(self.token_env, where)
        for option in ("template", "guide"):
            file = getattr(self, option)
            if file is not None and not Path(file).is_file():
                raise UserError(f"{where}: {option}: no file {file}{near_file(file)}")


class ScoreSpec(EndpointSpec):
    """A judge that gives each answer a whole number from 1 to `highest`."""

    highest: Count = Field(10, ge=2)
