"""What every section of the configuration is made of."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # of models: they become folder and file names

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Cosine = Annotated[float, Field(ge=-1, le=1)]


def _whole_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be a whole number of steps, or below 1 a share of them")
    return int(value) if value == int(value) else value


# A number of steps or, below 1, a share of all of them.
Steps = Annotated[float, Field(ge=0), AfterValidator(_whole_or_share)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_no_switches(cls, values: Any) -> Any:
        """Pydantic would take `true` for 1 and 1 for `true`; text for numbers stays, since YAML reads 5e-5 as text."""
        given = values if isinstance(values, dict) else {}
        for name in [name for name in given if name in cls.model_fields]:
            is_switch = cls.model_fields[name].annotation is bool
            for one in given[name] if isinstance(given[name], list) else [given[name]]:
                if is_switch and isinstance(one, int | float) and not isinstance(one, bool):
                    raise ValueError(f"{name} takes true or false, got {one}")
                if not is_switch and isinstance(one, bool):
                    raise ValueError(f"{name} takes no true or false, got {str(one).lower()}")
        return values
