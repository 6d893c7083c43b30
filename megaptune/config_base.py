"""What sections of a configuration have in common."""

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Limits(Section):
    """What all tasks have in common."""

    limit_train: int | None = Field(None, ge=1, description="use this many training records, sampled by limit_seed")
    limit_dev: int | None = Field(None, ge=1, description="the same for dev")
    limit_test: int | None = Field(None, ge=1, description="the same for test, for a quick look")
    limit_seed: int = Field(0, description="which records a limit samples; not tied to run.seeds")
