"""DeepSpeed's configuration for a frozen backbone; the only file that names its keys."""

from typing import Any, Literal


def frozen_backbone_config(zero_stage: int, dtype: Literal["fp32", "bf16"]) -> dict[str, Any]:
    """For ``deepspeed.initialize`` of a model without an optimizer."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # required, and unused: batches do not pass through the engine
        "gradient_clipping": 0.0,  # unwritten, DeepSpeed clips at norm 1.0
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {"stage": zero_stage},
        "steps_per_print": 2**31 - 1,
    }
    if zero_stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # partition every tensor
    return config
