"""What the models of all sections are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator
from pydantic_core import PydanticCustomError

Text = Annotated[str, Strict(), Field(min_length=1)]
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[Whole, Field(ge=1)]


def wrong(message: str) -> PydanticCustomError:
    """An error whose text is shown as it is; it must not repeat the input, which may be a secret."""
    return PydanticCustomError("kdtrain", "{text}", {"text": message})


class Section(BaseModel):
    """Base of all parts of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, value: Any) -> Any:
        # `rlhf:` with nothing below it is null in YAML; a section that was emptied means its defaults.
        return {} if value is None else value
