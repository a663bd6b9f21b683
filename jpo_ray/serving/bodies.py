"""Request bodies: what is taken, within limits. Anything else is refused with one line that names the field.

Stricter than the engine behind it on purpose: a field that it would pass on unread may cost a great deal there, or end
the engine. Null stands for a field that is not given. Reading stops at the first thing wrong of each list and object:
a megabyte of wrong numbers would otherwise hold the server up for seconds, while it makes an error of each.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from jpo_ray.config_base import NAME_PATTERN
from jpo_ray.config_serve import Limits
from jpo_ray.data.formats import instruction_of

MAX_MESSAGES = 256
MAX_ECHO = 60  # characters of a field's name or value that an error repeats: it has the name twice, the value once
INT64 = 2**63


class BodyError(ValueError):
    """A body that is not taken."""

    def __init__(self, message: str, param: str | None = None, status: int = 422) -> None:
        super().__init__(message)
        self.param, self.status = param, status


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no text") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Element = TypeVar("Element")
Several = Annotated[list[Element], Field(fail_fast=True)]
Stop = Annotated[Text, Field(min_length=1, max_length=200)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        """What is not null; of unknown fields one, which is enough to refuse them."""
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        unknown = [key for key in given if key not in cls.model_fields]
        for key in unknown[1:]:
            del given[key]
        return given


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Several[TextPart]
    name: Text | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Body):
    include_usage: bool = False


class PlainFormat(Body):
    type: Literal["text"]


class Sampling(Body):
    """What chat and plain completions share."""

    model: Annotated[Text, Field(max_length=64)]
    max_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    n: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    stop: Stop | Annotated[Several[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: Annotated[Text, Field(max_length=512)] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only for streams")
        return self

    def engine_fields(self, limits: Limits) -> dict[str, Any]:
        """The engine's request, prompt apart. Raises `BodyError` beyond the limits."""
        asked = self.answer_tokens()
        for name, value, most in (("max_tokens", asked, limits.max_tokens), ("n", self.n, limits.max_n)):
            if value is not None and value > most:
                raise BodyError(f"{name}: {value}, and this server gives at most {most}", name)
        fields = self.model_dump(exclude_none=True, exclude=self._ours())
        return fields | {"max_tokens": asked or limits.max_tokens}

    def answer_tokens(self) -> int | None:
        return self.max_tokens

    def _ours(self) -> set[str]:
        return {"user"}


class ChatBody(Sampling):
    messages: Annotated[Several[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: PlainFormat | None = None

    @model_validator(mode="after")
    def _somebody_asks(self) -> "ChatBody":
        if self.messages[-1].role == "assistant":
            raise ValueError("messages: the last one must not be the assistant's")
        if not any(message.text.strip() for message in self.messages):
            raise ValueError("messages: all of them are empty")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs")
        return self

    def instruction(self) -> str:
        """The conversation as the instruction that training would have made of it."""
        return instruction_of([(message.role, message.text) for message in self.messages])

    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def _ours(self) -> set[str]:
        return {"user", "messages", "response_format", "max_completion_tokens"}


Ids = Annotated[Several[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
FilledText = Annotated[Text, Field(min_length=1)]


Texts = Annotated[Several[FilledText], Field(min_length=1)]
ManyIds = Annotated[Several[Ids], Field(min_length=1)]


class CompletionBody(Sampling):
    prompt: FilledText | Ids | Texts | ManyIds
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> Any:
        """Texts, or lists of token ids, one entry for each prompt."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else self.prompt

    def _ours(self) -> set[str]:
        return {"user", "prompt"}


class Item(Body):
    instruction: FilledText
    response: FilledText


class ScoreBody(Body):
    model: Annotated[Text, Field(max_length=64)]
    items: Annotated[Several[Item], Field(min_length=1)]


class Pair(Body):
    a: Item
    b: Item


class CompareBody(Body):
    model: Annotated[Text, Field(max_length=64)]
    pairs: Annotated[Several[Pair], Field(min_length=1)]


class AdapterBody(Body):
    name: Annotated[Text, Field(pattern=NAME_PATTERN)]
    folder: Annotated[Text, Field(min_length=1, max_length=4096)]


Read = TypeVar("Read", bound=Body)


def read_body(kind: type[Read], content: bytes) -> Read:
    """A body from its bytes. Raises `BodyError` for the first thing that is wrong with it."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    except RecursionError:
        raise BodyError("the body is nested too deeply") from None
    if first["type"] == "json_invalid":
        raise BodyError("the body is not valid JSON", status=400)
    where = _field(first["loc"], extra=first["type"] == "extra_forbidden")
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = f" (got {shorten(repr(given))})" if isinstance(given, str | int | float | bool) else ""
    raise BodyError(shorten(f"{where}: {message}{shown}" if where else message, 400), where)


def _field(location: tuple[str | int, ...], *, extra: bool) -> str | None:
    """A field as its sender wrote it: pydantic also names the alternatives of a type that it tried."""
    named = [part for part in location if isinstance(part, int) or (part.isidentifier() and part != "str")]
    if extra and named[-1:] != [location[-1]]:
        named.append(location[-1])
    return shorten(".".join(map(str, named))) or None


def shorten(text: str, most: int = MAX_ECHO) -> str:
    """At most so many characters, printable ones."""
    printable = "".join(c if c.isprintable() else "?" for c in text[: most + 1])
    return printable if len(printable) <= most else printable[: most - 3] + "..."
