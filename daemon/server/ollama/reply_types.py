"""What Ollama's routes answer, for the schema. `events.py` and `models.py` write it; tests hold it
to these types."""

from __future__ import annotations

from msgspec import UNSET, Struct, UnsetType

from quantd.daemon.server.filtered import PromptResult, Results
from quantd.daemon.server.logprobs import ChatTokenLogprob
from quantd.daemon.server.schemas import Json


class AnswerCallFunction(Struct):
    index: int
    name: str
    arguments: dict[str, Json]


class AnswerCall(Struct):
    id: str
    function: AnswerCallFunction


class AnswerMessage(Struct):
    role: str
    content: str
    thinking: str | UnsetType = UNSET
    tool_calls: list[AnswerCall] | UnsetType = UNSET


class _Answer(Struct, kw_only=True):
    """Whole, or one line of a stream; the last one has the counts."""

    model: str
    created_at: str
    done: bool
    done_reason: str | UnsetType = UNSET
    logprobs: list[ChatTokenLogprob] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    """This and the others in nanoseconds."""
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET
    content_filter_results: Results | UnsetType = UNSET
    prompt_filter_results: list[PromptResult] | UnsetType = UNSET


class ChatAnswer(_Answer, kw_only=True):
    message: AnswerMessage


class GenerateAnswer(_Answer, kw_only=True):
    response: str
    thinking: str | UnsetType = UNSET


class EmbedAnswer(Struct):
    model: str
    embeddings: list[list[float]]
    total_duration: int | UnsetType = UNSET
    """Nanoseconds."""
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET


class EmbeddingAnswer(Struct):
    embedding: list[float]


class Details(Struct):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    """Empty where it is not known before the model is loaded, and so is the next."""
    quantization_level: str


class TaggedModel(Struct):
    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(Struct):
    models: list[TaggedModel]


class RunningModel(Struct):
    name: str
    model: str
    size: int
    size_vram: int
    digest: str
    details: Details
    expires_at: str
    context_length: int


class Running(Struct):
    models: list[RunningModel]


class ShownModel(Struct):
    modified_at: str
    template: str
    details: Details
    model_info: dict[str, Json]
    capabilities: list[str]


class ApiVersion(Struct):
    version: str
    """The release of Ollama whose API this is."""
    quantd: str
