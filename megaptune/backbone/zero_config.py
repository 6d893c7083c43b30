"""DeepSpeed's configuration for a frozen backbone; the only file that names its keys."""

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
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # required, and unused: batches do not pass through the engine
        "gradient_clipping": 0.0,  # unwritten, DeepSpeed clips at norm 1.0
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": zero,
        "steps_per_print": 2**31 - 1,
    }
    if parallel.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = 0  # partition every tensor
        zero["stage3_prefetch_bucket_size"] = PREFETCHED_ELEMENTS
        zero["stage3_max_reuse_distance"] = zero["stage3_max_live_parameters"] = REUSE_ELEMENTS
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
