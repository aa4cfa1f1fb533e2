"""The shapes of requests and replies, with examples; what OpenAI has a shape for has OpenAI's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from siglip_hf.inference.pipeline import DEFAULT_TEMPLATE

_TINY_PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42m"
    "P8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
_PART = {
    "type": "object",
    "description": "A content part: a text, or a picture as a data URI.",
    "properties": {
        "type": {"type": "string", "enum": ["text", "image_url"]},
        "text": {"type": "string"},
        "image_url": {"type": "object", "properties": {"url": {"type": "string"}}},
    },
}
_ONE = {"anyOf": [{"type": "string"}, _PART]}
_MANY = {"anyOf": [{"type": "string"}, _PART, {"type": "array", "items": _ONE}]}

#: A text or picture; the routes read it with sentences of their own for what is wrong.
Item = Annotated[Any, WithJsonSchema(_ONE)]
#: One or many texts and pictures.
Items = Annotated[Any, WithJsonSchema(_MANY)]


class Body(BaseModel):
    """A request. A field that is not known is a mistake, and told."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="The model that is served; it may be left out.")


class EmbeddingsRequest(Body):
    """Texts and pictures to embed."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": ["a red car", "a cat"]},
                {"input": [{"type": "image_url", "image_url": {"url": _TINY_PICTURE}}, "a cat"]},
            ]
        }
    )

    input: Items
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: of little-endian float32.")
    dimensions: int | None = Field(None, description="Only the model's own number is taken.")
    user: str | None = Field(None, description="Taken and not used.")


class ClassifyRequest(Body):
    """Pictures, and labels to score them against."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"images": [_TINY_PICTURE], "labels": ["a cat", "a dog"], "top_k": 1}]}
    )

    images: Items
    labels: list[str] | str = Field(description="A list, or one string that separates them by commas.")
    template: list[str] | str = Field(DEFAULT_TEMPLATE, description="With {} for the label; several are averaged.")
    top_k: int | None = Field(5, ge=1, description="Labels per picture, best first; null for all.")


class RerankRequest(Body):
    """A text or picture, and texts or pictures to order by how well they fit."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "a red car", "documents": ["a car", "a tree"], "top_n": 1}]}
    )

    query: Item
    documents: Items
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = Field(False, description="Texts come back with their scores; pictures do not.")


class SearchRequest(Body):
    """A question for an index: words, a picture, or both, and what it should not be."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"index": "photos", "text": "a red car", "k": 3}]})

    index: str | None = Field(None, description="Its name; it may be left out where there is only one.")
    text: str | None = None
    image: Item = None
    not_text: str | None = None
    k: int = Field(10, ge=1, le=1000)
    filter: str | None = Field(None, max_length=500, description="Only ids that match, with * and ?.")


class Usage(BaseModel):
    """Tokens of the texts, without padding; pictures have none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingRow(BaseModel):
    """One embedding, of length 1."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsReply(BaseModel):
    """Embeddings, in the order of the input."""

    object: Literal["list"] = "list"
    data: list[EmbeddingRow]
    model: str
    usage: Usage


class Label(BaseModel):
    """A label of a picture.

    cosine: bare similarity. logit: cosine x temperature + bias. sigmoid: the probability that the label fits, each on
    its own. softmax: its share among all labels of the request.
    """

    label: str
    cosine: float
    logit: float
    sigmoid: float
    softmax: float


class Labelled(BaseModel):
    """The labels of a picture, best first."""

    index: int
    labels: list[Label]


class ClassifyReply(BaseModel):
    """Labels, in the order of the pictures."""

    object: Literal["list"] = "list"
    data: list[Labelled]
    model: str


class Ranked(BaseModel):
    """A document.

    relevance_score: between a text and a picture the model's probability that they belong together; between two of a
    kind, for which the model has no probability, the cosine.
    """

    index: int
    relevance_score: float
    cosine: float
    document: str | None = None


class RerankReply(BaseModel):
    """Documents, the best first."""

    object: Literal["list"] = "list"
    results: list[Ranked]
    model: str
    usage: Usage


class Found(BaseModel):
    """A row of an index. `probability` is given between texts and pictures."""

    id: str
    cosine: float
    probability: float | None
    text: str | None = None


class SearchReply(BaseModel):
    """Rows, the best first."""

    object: Literal["list"] = "list"
    data: list[Found]
    index: str
    model: str


class IndexInfo(BaseModel):
    """An index that can be searched."""

    name: str
    rows: int
    content: Literal["image", "text"]


class IndexesReply(BaseModel):
    """All indexes."""

    object: Literal["list"] = "list"
    data: list[IndexInfo]


class ModelInfo(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "siglip-hf"
    dimensions: int


class ModelsReply(BaseModel):
    """All models, which is one."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ProblemReply(BaseModel):
    """What went wrong (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    error: dict[str, Any] = Field(description="The same for OpenAI's clients.")
