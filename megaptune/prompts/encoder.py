"""Prompt encoders: a handful of trained parameters become the rows of the prompt table.

All are fp32 and take no input: a prompt is the same for every example. R rows, D backbone width.
"""

import torch
from torch import Tensor, nn


class LstmEncoder(nn.Module):
    """The paper's: embedding R x D, two-layer bi-LSTM with D/2 per direction, MLP D -> D -> D with ReLU.

    Liu et al. 2021, section 2.2; sizes and initialisation (torch's defaults) as in the released LAMA code. An odd D
    gets (D + 1) / 2 per direction.
    """

    def __init__(self, rows: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = (width + 1) // 2
        self.embedding = nn.Embedding(rows, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, dropout=dropout, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(2 * hidden, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self) -> Tensor:
        """The table [R, D], fp32."""
        states, _ = self.lstm(self.embedding.weight.unsqueeze(0))
        # Two-dimensional: DeepSpeed replaces torch's linear for a tuned LM at ZeRO 3; there both add the bias alike.
        return self.mlp(states.squeeze(0))


class MlpEncoder(nn.Module):
    """Embedding R x D and the same MLP, without the LSTM."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self) -> Tensor:
        """The table [R, D], fp32."""
        return self.mlp(self.embedding.weight)


class TableEncoder(nn.Module):
    """The rows themselves (prompt tuning, Lester et al. 2021): no reparameterisation."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)

    def forward(self) -> Tensor:
        """The table [R, D], fp32."""
        return self.embedding.weight * 1.0


class HeadEncoder(nn.Module):
    """A linear layer's weights, one row a class, that start near nothing, as the heads of BERT's kind do."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self) -> Tensor:
        """The table [R, D], fp32."""
        return self.embedding.weight * 1.0


def build_encoder(name: str, rows: int, width: int, dropout: float, seed: int) -> nn.Module:
    """An encoder with the same weights on every rank: they depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "lstm":
            return LstmEncoder(rows, width, dropout)
        return {"mlp": MlpEncoder, "table": TableEncoder, "head": HeadEncoder}[name](rows, width)
