"""What every HTTP body is made of: ids, texts and counts, checked here, once. Unknown fields are refused."""

from __future__ import annotations

import unicodedata
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictInt
from pydantic_core import PydanticCustomError

from tandem.core.schema import MAX_ID_BYTES, id_problem

MAX_LIST: Final = 1000
"""Session items, excluded items or categories in one request."""

_ALLOWED_CONTROLS: Final = frozenset("\t\n\r")
_NOT_TEXT: Final = frozenset({"Cc", "Cs"})


def _id(value: str) -> str:
    normal = unicodedata.normalize("NFC", value)
    if id_problem(normal):
        raise PydanticCustomError("not_an_id", f"An id is 1-{MAX_ID_BYTES} bytes of text without control characters")
    return normal


def _text(value: str) -> str:
    normal = unicodedata.normalize("NFC", value)
    if any(unicodedata.category(letter) in _NOT_TEXT and letter not in _ALLOWED_CONTROLS for letter in normal):
        raise PydanticCustomError("not_text", "Text may hold neither control characters nor lone surrogates")
    return normal


Id = Annotated[
    str, AfterValidator(_id), Field(description=f"1-{MAX_ID_BYTES} bytes, no control characters; compared in Unicode form NFC")
]
Text = Annotated[str, AfterValidator(_text)]
Short = Annotated[Text, Field(max_length=256)]
Count = Annotated[StrictInt, Field(ge=1, description="How many items, at most the service's `max_k` (default 1000)")]


class Body(BaseModel):
    """A request body: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
