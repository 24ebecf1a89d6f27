"""What clients send: OpenAI's chat and text completions, as far as a local model can honour them.

Field names and meanings are those of OpenAI's API reference. Types are taken at their word. Fields that
change nothing here are named and ignored; others, and values that cannot be honoured, are refused by name: a
misspelt max_token would else be an answer without end.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from moe_local.cache.errors import OptionError
from moe_local.cli.server.allowed_tools import allow
from moe_local.cli.server.tool_choice import call_grammar
from moe_local.offload.answer_format.answer_format import AnswerFormat, functions_of
from moe_local.offload.answer_format.template_needs import SWITCHES
from moe_local.offload.engine.conversation import check_messages, check_tools
from moe_local.offload.ranges import check_range, nth_seed

MOST_CHOICES = 16
COMPLETION_TOKENS = 16
"""New tokens of a completion that asks for no number, as OpenAI and vLLM have it. A text that is continued
seldom comes to an end by itself: without a limit it would run until the context is full."""
OFF = -1
"""A limit that is none: what llama.cpp's clients send for `max_tokens`, and vLLM's for `top_k`."""

MOST_STOPS = 64
"""Stop strings of a request; all are looked for in each token of all of its answers."""


class Drawing(BaseModel):
    """How an answer is drawn, which all kinds of request have in common."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stream: bool = False
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, given: Any) -> Any:
        """null means: as if it were not there."""
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given

    @field_validator("stop", "stop_sequences", check_fields=False)
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if any(not string for string in strings):
            raise OptionError("a stop string is empty; leave it out")
        if len(strings) > MOST_STOPS:
            raise OptionError(f"there are {len(strings)} stop strings; at most {MOST_STOPS} are looked for")
        return stop

    @field_validator(
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "seed",
    )
    @classmethod
    def _check_range(cls, value: float | None, field: ValidationInfo) -> float | None:
        if field.field_name == "top_k" and value == OFF:
            return 0
        check_range(str(field.field_name), value)
        return value

    @field_validator("logprobs", "top_logprobs", check_fields=False)
    @classmethod
    def _check_logprobs(cls, value: int | None, field: ValidationInfo) -> int | None:
        if not isinstance(value, bool):  # as a chat has them
            check_range("logprobs", value, called=field.field_name)
        return value

    @field_validator("max_tokens", "max_completion_tokens", "max_output_tokens", check_fields=False)
    @classmethod
    def _check_tokens(cls, value: int | None, field: ValidationInfo) -> int | None:
        if value == OFF:
            return None
        check_range("max_new_tokens", value, called=field.field_name)
        return value


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool | None = None


class OpenAIRequest(Drawing):
    """What OpenAI's kinds of request have in common beside that; the rest is for OpenAI's own bookkeeping."""

    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class Sampling(OpenAIRequest):
    """What both kinds of completion have in common."""

    max_tokens: int | None = None
    n: int = Field(default=1, ge=1, le=MOST_CHOICES)

    def check(self) -> None:
        """Raises OptionError for what is asked for and cannot be had."""

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def most_tokens(self) -> int | None:
        """New tokens at most; None leaves it to the server."""
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """How many of the likeliest tokens each one comes with; None: no log probabilities are wanted."""
        return None

    def form(self, answers: AnswerFormat) -> dict[str, Any]:
        """Keyword arguments of Model.submit that say what an answer must look like, where the model writes
        its answers so."""
        return {}

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def generation(self, choice: int, answers: AnswerFormat) -> dict[str, Any]:
        """Keyword arguments of Model.submit for one of the `n` choices; each draws from a seed of its own."""
        wanted = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "logprobs": self.likeliest,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": self.logit_bias,
            **self.form(answers),
            "seed": None if self.seed is None else nth_seed(self.seed, choice),
        }
        return {name: value for name, value in wanted.items() if value is not None}


class CompletionRequest(Sampling):
    """`POST /v1/completions`: a text, or token ids, to be continued."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None

    @field_validator("max_tokens")
    @classmethod
    def _check_tokens(cls, value: int | None, field: ValidationInfo) -> int | None:
        return value if value in (0, OFF) else super()._check_tokens(value, field)

    @property
    def most_tokens(self) -> int | None:
        if self.max_tokens == OFF:
            return None
        return COMPLETION_TOKENS if self.max_tokens is None else max(1, self.max_tokens)

    @property
    def only_echo(self) -> bool:
        """Whether the prompt is all that is wanted: how evaluations ask how likely a text is."""
        return self.max_tokens == 0

    @property
    def likeliest(self) -> int | None:
        return self.logprobs

    def generation(self, choice: int, answers: AnswerFormat) -> dict[str, Any]:
        scored = {"prompt_logprobs": True} if self.echo and self.logprobs is not None else {}
        return {**super().generation(choice, answers), **scored}

    def prompts(self) -> list[str | list[int]]:
        """One or several. Raises OptionError for what is none."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and all(isinstance(item, int) for item in prompt):
            return [prompt]  # type: ignore[list-item]
        return list(prompt)  # type: ignore[arg-type]

    def check(self) -> None:
        super().check()
        if self.suffix:
            raise OptionError("suffix is not supported; put the text in front into prompt")
        if self.best_of not in (None, 1, self.n):
            raise OptionError(f"best_of {self.best_of} is not supported; use n")
        if self.max_tokens == 0 and not self.echo:
            raise OptionError("max_tokens is 0; it must be a whole number, 1 or more, or come with an echo")
        if not self.prompts():
            raise OptionError("prompt is an empty list; give a text, or token ids")


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`: a conversation, and tools that its template may know."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    """False: the answer ends with its first call."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    verbosity: str | None = None
    reasoning_effort: str | None = None
    """For templates that know it; "none" turns thoughts off in others, too."""
    truncation: Literal["auto", "disabled"] = "disabled"
    """Whether the oldest of a conversation beyond the context is left out, or all of it refused; as OpenAI's
    Responses have it."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further variables of the template, such as enable_thinking; not OpenAI's, but what others have."""

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        return check_tools(tools)

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise OptionError("top_logprobs need logprobs: true beside them")
        if self.modalities not in (None, [], ["text"]):
            raise OptionError(f"modalities {self.modalities} are not supported; text is")

    @property
    def likeliest(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None

    def generation(self, choice: int, answers: AnswerFormat) -> dict[str, Any]:
        return {**super().generation(choice, answers), **answers.options}

    def form(self, answers: AnswerFormat) -> dict[str, Any]:
        """A call of a tool where one is demanded, or JSON, or either. Raises OptionError for what there is
        not."""
        schema, (choice, tools) = self._json_schema, self._allowed
        if choice == "required" or isinstance(choice, dict):
            named = None if choice == "required" else choice
            return {"grammar": call_grammar(answers, tools, named)}
        if schema is None:
            return {}
        if self.offered_tools:
            return {"grammar": call_grammar(answers, self.offered_tools, None, schema)}
        return {"json_schema": schema}

    @property
    def _json_schema(self) -> Any:
        """As OpenAI has it: any object, or what a schema says. Raises OptionError for other formats."""
        form = self.response_format or {}
        match form.get("type", "text"):
            case "text":
                return None
            case "json_object":
                return {"type": "object"}
            case "json_schema":
                given = form.get("json_schema")
                if not isinstance(given, dict) or not isinstance(given.get("schema"), dict):
                    raise OptionError("response_format has no json_schema.schema; give it, or json_object")
                return given["schema"]
            case kind:
                raise OptionError(
                    f"response_format {kind!r} is not supported; text, json_object and json_schema are"
                )

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        choice, tools = self._allowed
        return None if choice == "none" else tools or None

    @property
    def _allowed(self) -> tuple[Any, list[dict[str, Any]]]:
        return allow(self.tool_choice, self.tools or [])

    @property
    def functions(self) -> dict[str, Any] | None:
        """Parameters of the functions that may be called; None: no call is looked for."""
        return None if self.offered_tools is None else functions_of(self.offered_tools)

    @property
    def template_variables(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        off = dict.fromkeys(SWITCHES, False) if self.reasoning_effort == "none" else {}
        return {**effort, **off, **self.chat_template_kwargs}

    def conversation(self) -> list[dict[str, Any]]:
        """The messages with their content as text. Raises OptionError for pictures and the like."""
        return check_messages(self.messages)
