"""What the sections of a configuration are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Score = Annotated[float, Field(ge=0.0, le=100.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Standing = Annotated[float, Field(gt=-1.0, lt=0.0)]
Port = Annotated[int, Field(ge=0, le=65535)]


def _pool_name(name: str) -> str:
    """As the pool itself has it (`memshare.pool.validate`), which is not to be loaded for this."""
    if not (0 < len(name) <= 200 and name.isprintable() and name == name.strip()):
        raise ValueError("1 to 200 printable characters without space around them expected")
    return name


PoolName = Annotated[str, AfterValidator(_pool_name)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading.

    Numbers are finite, since they are kept as JSON, which has no others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
