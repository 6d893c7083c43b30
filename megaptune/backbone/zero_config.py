"""DeepSpeed's configuration for a backbone, frozen or tuned; the only file that names its keys."""

from typing import Any, Literal

from megaptune.config import ParallelConfig

# ZeRO 3 fetches this many elements ahead of the module that runs, and keeps a fetched parameter that is needed again
# within so many elements of others. DeepSpeed's defaults, written out because memory is planned with them.
PREFETCHED_ELEMENTS = 50_000_000
REUSE_ELEMENTS = 1_000_000_000


def frozen_backbone_config(
    parallel: ParallelConfig, dtype: Literal["fp32", "bf16"], largest_share: int = 0, pinned: bool = False
) -> dict[str, Any]:
    """For ``deepspeed.initialize`` of a model without an optimizer.

    :param largest_share: elements of the largest partition, which a buffer of NVMe offload must hold.
    :param pinned: page-locked host memory for offloaded weights, where there is a device to copy to.
    """
    # 1 and 2 divide what an optimizer needs; here is none.
    zero: dict[str, Any] = {"stage": 3 if parallel.zero_stage == 3 else 0}
    config = _common(zero, dtype)
    if zero["stage"] == 3:
        zero["memory_efficient_linear"] = False  # it would keep the inputs of frozen layers; see frozen_linear.py
    if parallel.offload != "none":
        zero["offload_param"] = {"device": parallel.offload, "pin_memory": pinned}
    if parallel.offload == "nvme":
        zero["offload_param"] |= {
            "nvme_path": str(parallel.offload_folder),
            "buffer_count": 8,
            "buffer_size": max(largest_share, 1 << 20),
        }
        # DeepSpeed 0.19.8 dies at the second step when it fetches ahead from NVMe: "already assigned swap buffer".
        zero["stage3_prefetch_bucket_size"] = 0
    return config


def tuned_backbone_config(
    parallel: ParallelConfig, dtype: Literal["fp32", "bf16"], max_gradient_norm: float | None
) -> dict[str, Any]:
    """For ``deepspeed.initialize`` of a model with torch's optimizer over all its weights.

    ZeRO 0 becomes 1, which sends as much and holds less. In bf16, 1 becomes 2: DeepSpeed's stage 1 would hold all
    fp32 gradients on every rank. Master weights, moments and accumulated gradients are fp32.
    """
    stage = tuned_stage(parallel.zero_stage, dtype)
    config = _common({"stage": stage, "overlap_comm": False}, dtype)
    config["gradient_clipping"] = max_gradient_norm or 0.0
    config["zero_allow_untested_optimizer"] = True  # torch's own: DeepSpeed's would be built from C++ sources
    # A step ends when the trainer says so: the number of micro-batches differs between steps.
    config["managed_gradient_accumulation"] = False
    if dtype == "bf16":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def tuned_stage(stage: int, dtype: str) -> int:
    """The stage that a tuned LM gets where ``stage`` is asked for."""
    return max(2 if dtype == "bf16" else 1, stage)


def zero_stage(config: dict[str, Any]) -> int:
    """The stage of a configuration made here."""
    return int(config["zero_optimization"]["stage"])


def _common(zero: dict[str, Any], dtype: Literal["fp32", "bf16"]) -> dict[str, Any]:
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0  # partition every tensor
        zero["stage3_prefetch_bucket_size"] = PREFETCHED_ELEMENTS
        zero["stage3_max_reuse_distance"] = zero["stage3_max_live_parameters"] = REUSE_ELEMENTS
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, and unused: batches do not pass through the engine
        "gradient_clipping": 0.0,  # unwritten, DeepSpeed clips at norm 1.0
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": zero,
        "steps_per_print": 2**31 - 1,
    }
