"""The learning-rate schedule, as a factor of whatever rate is the highest."""

from megaptune.config import TrainConfig


def rate_factor(train: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Between 0 and 1, for the optimizer step that follows ``step`` steps."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "exponential":
        return train.decay_per_epoch ** (step // steps_per_epoch)
    if train.schedule == "linear":
        total = train.epochs * steps_per_epoch
        return max(train.final_fraction, (total - step) / max(1, total - train.warmup_steps))
    return 1.0


def adam_or_sgd(train: TrainConfig) -> type:
    """torch's optimizer for prompts and LM alike; its weight decay is the L2 term of the released code."""
    import torch

    return {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[train.optimizer]
