"""The sections of a configuration that say how a run is hosted: none of them decides a result."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megaptune.config_base import Section


class ParallelConfig(Section):
    """How ranks share the work. ``parallel: auto`` lets the memory plan fill in the rest."""

    layout: Literal["stated", "auto"] = Field(
        "stated", description="auto: the memory plan chooses tensor_parallel, zero_stage and offload"
    )
    tensor_parallel: int = Field(
        1, ge=1, description="ranks that hold one copy of the backbone together, each a slice of every layer"
    )
    across_nodes: bool = Field(False, description="let a tensor-parallel group span nodes, which is slow")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="0: every replica holds its weights; 3: replicas hold a share each; 1, 2: for a tuned LM only"
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="where ZeRO 3 keeps weights that are not in use: on the device, in host memory, on disk"
    )
    offload_folder: Path | None = Field(None, description="a folder on a fast local disk, for offload: nvme")
    activation_checkpointing: bool = Field(
        False, description="keep one activation a block and compute the others again in backward"
    )
    check_memory: bool = Field(True, description="refuse a layout that cannot fit, before weights are read")

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return {"layout": "auto"} if value == "auto" else value

    @model_validator(mode="after")
    def _offload_fits(self) -> "ParallelConfig":
        if self.offload != "none" and self.layout == "stated" and self.zero_stage != 3:
            raise ValueError(f"offload: {self.offload} needs zero_stage: 3, which is {self.zero_stage}")
        if (self.offload == "nvme") != (self.offload_folder is not None) and self.layout == "stated":
            raise ValueError("offload: nvme and offload_folder go together; one of them is missing")
        return self


class SpeedConfig(Section):
    """Work that need not be done. Nothing here changes a result beyond rounding."""

    answers_only: bool = Field(True, description="the output embedding is applied at the answer positions alone")
    candidates_only: bool = Field(True, description="and to the rows of the candidates alone")
    length_buckets: bool = Field(True, description="micro-batches hold examples of similar length")
    packing: bool = Field(True, description="a micro-batch's tokens lie one after the other: no padding is computed")
    share_leading_tokens: bool = Field(
        True,
        description="tokens that examples begin with alike, a leading prompt's too, are computed once",
    )
    cut_last_block: bool = Field(True, description="the last block's queries and MLP are computed at the answers alone")
    context_cache: bool = Field(
        True, description="keep keys and values of what precedes an example's first pseudo token, over all epochs"
    )
    context_host_gib: float = Field(2.0, ge=0, description="context cache: a rank's share of host memory, at most")
    context_device_gib: float = Field(0.0, ge=0, description="context cache: of a GPU's memory")
    context_disk_gib: float = Field(8.0, ge=0, description="context cache: files in the run directory, for a resume")
    compile_blocks: bool = Field(False, description="torch.compile of the backbone's blocks; the first step takes long")

    @property
    def packs(self) -> bool:
        """Whether a saving asks for packed batches, which are read at the answers alone."""
        wanted = self.packing or self.share_leading_tokens or self.cut_last_block or self.context_cache
        return wanted and self.answers_only


class LaunchConfig(Section):
    """Patience and checks until the first step; nothing here can change a result."""

    join_timeout_s: float = Field(600, gt=0, description="how long the ranks that are there wait for the others")
    first_step_timeout_s: float = Field(
        1800,
        gt=0,
        description="until the first step: how long the others wait for one rank before it is named and all leave",
    )
    preflight: bool = Field(True, description="check every rank's host after joining; failures stop the run")
    min_free_disk_gib: float = Field(
        1.0, ge=0, description="preflight: free space wanted at run.directory and parallel.offload_folder"
    )


class KernelConfig(Section):
    implementation: Literal["auto", "reference", "triton", "cuda"] = Field(
        "auto",
        description="auto: Triton on CUDA, plain torch on CPU; cuda: CUDA C++, which nvcc compiles at the first run",
    )
    require: bool = Field(False, description="an error instead of the plain path when kernels cannot be used")
