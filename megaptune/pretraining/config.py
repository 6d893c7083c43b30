"""The configuration of ``megaptune pretrain``; files, layers and mistakes are handled as for every other command."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megaptune import config_files


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunSection(Section):
    directory: Path = Field(description="the Hugging Face folder to write, for backbone.path; the same one continues")
    seed: int = Field(0, ge=0, lt=2**31, description="of the weights, the order of the lines, masks and dropout")
    threads: int = Field(1, ge=1, description="CPU threads; another number can change the last bits")
    checkpoint_every_steps: int = Field(200, ge=1, description="steps that an interruption costs at most")
    log_every: int = Field(50, ge=1, description="steps between log lines")


class CorpusSection(Section):
    path: Path = Field(description="UTF-8 text, one sentence a line, .gz or plain")
    max_words: int | None = Field(None, ge=1, description="leave out longer lines")
    limit_lines: int | None = Field(None, ge=2, description="use this many lines, sampled by run.seed")
    held_out_lines: int = Field(500, ge=1, description="lines kept from training, for the loss that is reported")


class TokenizerSection(Section):
    vocab_size: int = Field(16000, ge=300, description="tokens, special ones included; fewer if the text gives no more")


class ModelSection(Section):
    kind: Literal["gpt2", "bert"] = Field(description="gpt2: causal, byte-level BPE; bert: masked, cased WordPiece")
    layers: int = Field(4, ge=1, description="transformer blocks")
    width: int = Field(256, ge=1, description="of the hidden states and the tied embedding")
    heads: int = Field(4, ge=1, description="attention heads")
    max_tokens: int = Field(64, ge=4, description="positions; longer lines are cut here")
    dropout: float = Field(0.0, ge=0, lt=1, description="of hidden states and attention")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelSection":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class TrainSection(Section):
    epochs: int = Field(4, ge=1, description="passes over the training lines")
    batch_tokens: int = Field(2048, ge=1, description="tokens of a step, padding counted; one line at least")
    learning_rate: float = Field(1e-3, gt=0, description="AdamW's, after the warm-up; it falls linearly to nothing")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate grows")
    weight_decay: float = Field(0.01, ge=0, description="decoupled, of matrices only")
    max_gradient_norm: float = Field(1.0, gt=0, description="clip the gradient at this norm")
    mask_fraction: float = Field(0.15, gt=0, lt=1, description="bert: share of the tokens to be predicted")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of matrix products; weights stay fp32. bf16 is faster where the CPU has AMX"
    )


class PretrainConfig(Section):
    run: RunSection
    corpus: CorpusSection
    tokenizer: TokenizerSection = TokenizerSection()
    model: ModelSection
    train: TrainSection = TrainSection()

    def identity(self) -> dict[str, Any]:
        """What decides the weights, as ``section.key``: all but where they go, threads, checkpoints and log lines."""
        sections = self.model_dump(mode="json")
        sections["run"] = {"seed": self.run.seed}
        sections["corpus"].pop("path")  # its bytes decide, wherever they lie
        return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def load_pretrain_config(path: Path, overrides: list[str] | None = None) -> PretrainConfig:
    """Read, layer and validate a file; ``overrides`` are ``a.b=value`` strings.

    :raises ConfigError: with every problem found, and the nearest valid key for an unknown one.
    """
    resolve = config_files.PathResolver(("corpus.path",), keep=lambda value: False)
    raw = config_files.read_layers(path, resolve)
    for override in overrides or []:
        config_files.apply_override(raw, override, resolve)
    return config_files.validated(PretrainConfig, raw, source=str(path))
