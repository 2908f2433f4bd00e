"""OpenAI's chat protocol: requests are checked and become conversations, answers become objects of the protocol.

Unknown fields and values that the server cannot honour are refused, as OpenAI's server does: a request that is half
understood gives wrong answers without a warning. Two additions: the field `redux`, and the counts of image tokens in
`usage.prompt_tokens_details`.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.serving.images import read_image_url
from pipelines.serving.settings import RequestLimits
from redux.messages import Message, Sampling

DEFAULT_NEW_TOKENS = 512


class ProtocolObject(BaseModel):
    """An object of a request; unknown fields and other types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(ProtocolObject):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(ProtocolObject):
    """URL of an image; the level of detail is always the model's own."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(ProtocolObject):
    """Image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(ProtocolObject):
    """A message of a request."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None


class StreamOptions(ProtocolObject):
    """Options of a stream."""

    include_usage: bool = False


class ResponseFormat(ProtocolObject):
    """Form of the answer."""

    type: Literal["text"]


class ReduxOptions(ProtocolObject):
    """Redux's own options: `trace` adds what the method did for the answer."""

    trace: bool = False


class ChatRequest(ProtocolObject):
    """A request for a chat completion."""

    model: str
    messages: list[ChatMessage]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=False)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    redux: ReduxOptions = ReduxOptions()
    # Accepted only with the value that changes nothing.
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0, strict=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0, strict=False)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    # Accepted without effect.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    def build_messages(self, limits: RequestLimits) -> list[Message]:
        """Build the conversation, with its images.

        Raises:
            ValueError: there are too many images, or one cannot be used.
        """
        parts = [part for message in self.messages if isinstance(message.content, list) for part in message.content]
        count = sum(isinstance(part, ImagePart) for part in parts)
        if count > limits.images:
            raise ValueError(f"messages: got {count} images, allowed: up to {limits.images}")
        return [_build_message(message, limits) for message in self.messages]

    def build_sampling(self, limits: RequestLimits) -> Sampling:
        """Build the sampling. Without a temperature the answer is greedy, as in evaluation."""
        # OpenAI renamed the field; clients send either.
        requested = self.max_completion_tokens or self.max_tokens or DEFAULT_NEW_TOKENS
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_new_tokens=min(requested, limits.new_tokens),
            temperature=float(self.temperature or 0),
            top_p=float(1 if self.top_p is None else self.top_p),
            seed=self.seed,
            stop=tuple(stop),
        )


def parse_request(body: bytes) -> ChatRequest:
    """Parse the body of a request.

    Raises:
        ValueError: names the first wrong field.
    """
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        # Clients show one line, so the first problem is enough.
        first_problem = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(str(part) for part in first_problem["loc"] if part not in ("str", "list[union]"))
        raise ValueError(f"{path or 'body'}: {first_problem['msg']}") from None


def _build_message(message: ChatMessage, limits: RequestLimits) -> Message:
    # Newer clients call the system role developer.
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return Message(role=role, text=message.content)
    texts = [part.text for part in message.content if isinstance(part, TextPart)]
    images = [read_image_url(part.image_url.url, limits) for part in message.content if isinstance(part, ImagePart)]
    return Message(role=role, text="\n".join(texts), images=tuple(images))


def build_error(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """Build the body of an error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def build_usage(prompt_tokens: int, new_tokens: int, image_tokens: int, image_tokens_before: int) -> dict[str, Any]:
    """Build the usage of an answer; `image_tokens_before` are those of a LLaVA without compression."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
        "prompt_tokens_details": {"image_tokens": image_tokens, "image_tokens_before": image_tokens_before},
    }


class Completion:
    """Identity of an answer, and its objects in the protocol.

    Args:
        model: name of the model.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def build_response(self, text: str, finish_reason: str, usage: dict[str, Any]) -> dict[str, Any]:
        """Build the object of a whole answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage}

    def build_chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """Build a chunk of a stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def build_last_chunk(self, **content: Any) -> dict[str, Any]:
        """Build a chunk without text, for usage or a trace."""
        return {**self._head("chat.completion.chunk"), "choices": [], **content}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def build_model_list(names: Sequence[str], created: int) -> dict[str, Any]:
    """Build the list of models."""
    models = [{"id": name, "object": "model", "created": created, "owned_by": "redux"} for name in names]
    return {"object": "list", "data": models}
