"""What the sections of a configuration are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Score = Annotated[float, Field(ge=0.0, le=100.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Standing = Annotated[float, Field(gt=-1.0, lt=0.0)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading.

    Numbers are finite, since they are kept as JSON, which has no others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
