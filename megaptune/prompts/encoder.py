"""Prompt encoders: a handful of trained parameters become the rows of the prompt table.

All are fp32 and take no input: a prompt is the same for every example. R rows, D their width: the backbone's, or that
of a layer's keys for deep prompts.
"""

import torch
from torch import Tensor, nn

from megaptune.config import DeepConfig


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
    """The rows themselves (prompt tuning, Lester et al. 2021; deep prompts of P-tuning v2): no reparameterisation."""

    def __init__(self, rows: int, width: int, std: float = 1.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)
        self.embedding.weight.data *= std

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


class DeepMlpEncoder(nn.Module):
    """Prefix tuning's (Li and Liang 2021, section 4.3): an embedding of P virtual tokens and an MLP with tanh, which
    makes the R / P rows of each, its keys and values of all layers."""

    def __init__(self, tokens: int, rows: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, rows // tokens * width))

    def forward(self) -> Tensor:
        """The table [R, D], fp32; a token's rows one after the other."""
        return self.mlp(self.embedding.weight).view(-1, self.embedding.embedding_dim)


def build_encoder(
    name: str, rows: int, width: int, dropout: float, seed: int, deep: DeepConfig | None = None
) -> nn.Module:
    """An encoder with the same weights on every rank: they depend on ``seed`` alone.

    :param deep: for the encoders of deep prompts: how many virtual tokens the rows are, and sizes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "lstm":
            return LstmEncoder(rows, width, dropout)
        if name.startswith("deep"):
            assert deep is not None, "deep prompts have settings of their own"
            if name == "deep_table":
                return TableEncoder(rows, width, deep.init_std)
            return DeepMlpEncoder(deep.length, rows, width, deep.hidden_size)
        return {"mlp": MlpEncoder, "table": TableEncoder, "head": HeadEncoder}[name](rows, width)
