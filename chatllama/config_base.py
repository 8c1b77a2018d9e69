"""What every section of the YAML is made of: the strict base class, number types, `DataSource`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[list[Fraction], Field(min_length=2, max_length=2)]
Schedule = Literal["linear", "cosine", "constant"]
Format = Literal[
    "alpaca",
    "messages",
    "sharegpt",
    "prompt_completion",
    "text",
    "preference",
    "hh",
    "ranked",
    "prompts",
]


class Section(BaseModel):
    """A part of the YAML: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class DataSource(Section):
    """One data set of a stage's mixture."""

    path: str
    """A file (json, jsonl, csv, parquet, txt, also .gz), or the id of a data set on the hub."""
    format: Format | None = None
    """How records are laid out. null: told from the keys of the first record."""
    split: str = "train"
    """Split to read, for hub data sets."""
    weight: PositiveFloat | None = None
    """Sampling proportion in the mixture; give it to all sources or to none."""
    epochs: PositiveFloat = 1.0
    """With weights: the most passes over this source. Without: the passes it contributes."""
