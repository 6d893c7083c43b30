"""Hosting a frozen language model: load, freeze, hand to DeepSpeed, and read it at the answer positions.

Families of ``architectures.py`` are loaded slice by slice and may be divided over tensor-parallel ranks. Any other
causal or masked LM of transformers is read whole, and serves if its answer scores are ``features @ weight.T + bias``:
that is checked on a probe input, so a family with another read-out is refused instead of scored wrongly.

B examples, T tokens, R table rows, D backbone width, V vocabulary.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaptune.backbone.architectures import FAMILIES, blocks_of, divisible, vocabulary_range
from megaptune.backbone.compiled import compile_blocks, require_compilable
from megaptune.backbone.context_cache import ContextCache, worth_keeping
from megaptune.backbone.deep_prompts import DeepPrompts
from megaptune.backbone.description import BackboneDescription
from megaptune.backbone.engine import start_engine, zero_init
from megaptune.backbone.fingerprint import Fingerprint, probe_ids, rows_checksum
from megaptune.backbone.frozen_linear import keep_no_inputs
from megaptune.backbone.inputs import Inputs, Packed, Padded, Positions, pack, pad
from megaptune.backbone.loading import DTYPES, load_divided
from megaptune.backbone.output_rows import OutputEmbedding, OutputRows
from megaptune.backbone.packed_attention import BlockForward, Reading, cut_last_block, no_mask, read_packed
from megaptune.backbone.tensor_parallel import splice
from megaptune.backbone.weights import FrozenWeights, Weights
from megaptune.backbone.whole_model import load_whole
from megaptune.backbone.zero_config import frozen_backbone_config, zero_stage
from megaptune.config import ParallelConfig, SpeedConfig
from megaptune.errors import BackboneError
from megaptune.kernels import dispatch
from megaptune.run import roll_call
from megaptune.run.grid import ProcessGrid
from megaptune.run.topology import agree

PROBE_SCORES = 32
PROBE_TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}  # relative to the largest logit; bf16 has 8 bits of mantissa


class PromptedBackbone(nn.Module):
    """A language model taken apart at its two ends: slots go in, features at one position per example come out."""

    def __init__(self, model: Any, grid: ProcessGrid, first_id: int) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        self.body = model.base_model
        self.readout = _detach_readout(model, head)
        self.head = head
        embedding = self.body.get_input_embeddings()
        # Held under a name of its own: ZeRO-3 gathers what the module that runs owns, and the embedding never runs.
        self.vocabulary = embedding.weight
        self.embedding_scale = float(getattr(embedding, "embed_scale", None) or 1.0)
        self.grid, self.first_id = grid, first_id
        self.reading: Reading | None = None
        self.first_position = 0
        self.deep: DeepPrompts | None = None
        family = FAMILIES.get(model.config.model_type)
        if family is not None:
            self.reading = read_packed(model, family)
            self.deep = DeepPrompts.of(model.config)
            self.first_position = model.config.pad_token_id + 1 if family.counts_from_padding else 0

    def forward(
        self,
        inputs: Inputs,
        table: Tensor,
        kept: Tensor | None = None,
        everywhere: bool = False,
        record: bool = False,
    ) -> Tensor:
        """inputs, table [R, D] fp32 -> features [B, D], or one for every position that is read; of a padded batch
        ``everywhere`` [B, T, D], if wanted.

        :param table: of a batch with deep prompts their rows instead [R, k * E].
        :param kept: keys and values of a packed batch's contexts [L, 2, S, heads, P, head width].
        :param record: return keys and values of a packed batch's tokens instead [L, 2, heads, N, head width].
        """
        deep = None
        if isinstance(inputs, Packed) and inputs.prompts is not None:
            assert self.deep is not None, "packed batches are for families of the table"
            deep = self.deep.by_layer(table, inputs.virtual_tokens, self.grid)
            table = table.new_zeros(0, self.vocabulary.shape[-1])
        embeds = self.embed(inputs.slots, table)
        if isinstance(inputs, Packed):
            recorded: list[Tensor] | None = [] if record else None
            features = self.read_packed(embeds, inputs, kept, recorded, deep)
            return features if recorded is None else torch.stack(recorded)
        return self.read(embeds, inputs.attention_mask, None if everywhere else inputs.answer_positions, inputs.rows)

    def read(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        answer_positions: Tensor | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """embeds [B, T, D] -> features [B, D]; without answer positions, of all [B, T, D]; ``rows`` as in Padded."""
        if self.reading is not None:
            self.reading.begin(None)
        output = self.body(inputs_embeds=embeds, attention_mask=attention_mask, **self.body_options)
        hidden = output.last_hidden_state  # [B, T, D]
        if answer_positions is not None:
            rows = torch.arange(hidden.shape[0], device=hidden.device) if rows is None else rows
            hidden = hidden[rows, answer_positions]
        return hidden if self.readout is None else self.readout(hidden)

    def read_packed(
        self,
        embeds: Tensor,
        packed: Packed,
        kept: Tensor | None = None,
        record: list[Tensor] | None = None,
        deep: list[Tensor] | None = None,
    ) -> Tensor:
        """embeds [1, N, D] -> features [B, D]."""
        assert self.reading is not None, "packed batches are for families of the table"
        self.reading.begin(packed, kept, record, deep)
        output = self.body(
            inputs_embeds=embeds,
            attention_mask=no_mask(embeds),
            position_ids=packed.positions + self.first_position,
            **self.body_options,
        )
        at_answers = output.last_hidden_state[0, packed.answers]
        return at_answers if self.readout is None else self.readout(at_answers)

    def embed(self, slots: Tensor, table: Tensor) -> Tensor:
        """Vocabulary rows with rows of the table spliced in [B, T, D]."""
        if self.grid.shards == 1:
            return dispatch.prompt_splice(slots, self.vocabulary, table, self.embedding_scale)
        return splice(slots, self.vocabulary, self.first_id, table, self.embedding_scale, self.grid.tensor_group)

    @property
    def body_options(self) -> dict[str, Any]:
        return {"use_cache": False} if hasattr(self.body.config, "use_cache") else {}


def _detach_readout(model: Any, head: nn.Module) -> nn.Module | None:
    """What lies between the last hidden state and the output embedding: BERT's ``cls``, RoBERTa's ``lm_head``, nothing.

    The output embedding inside it is replaced by the identity, so it yields the features that the rows multiply.
    """
    for child in model.children():
        if child is head:
            return None
        for inner_name, inner in child.named_modules():
            if inner is head and child is not model.base_model:
                owner = child.get_submodule(inner_name.rpartition(".")[0])
                setattr(owner, inner_name.rpartition(".")[2], nn.Identity())
                return child
    raise BackboneError(f"{type(model).__name__}: its output embedding was not found where language models have it")


class BackboneHost:
    """The model under DeepSpeed. ``kind``: causal or masked; ``num_parameters`` counts the whole model;
    ``fingerprint`` is what a prompt trained on it remembers of it.

    ``weights`` is how a trainer sees what may or may not be trained of it; here nothing is.
    """

    trained = False
    weights: Weights = FrozenWeights()

    def __init__(
        self,
        description: BackboneDescription,
        dtype: Literal["fp32", "bf16"],
        parallel: ParallelConfig,
        grid: ProcessGrid,
        device: torch.device,
        speed: SpeedConfig | None = None,
    ) -> None:
        self.speed = speed or SpeedConfig()
        self.folder, self.family, self.kind = description.folder, description.family, description.kind
        self.dtype, self.device, self.grid, self.parallel = dtype, device, grid, parallel
        if grid.shards > 1:
            divisible(self.family)
        largest = -(-description.largest_tensor // grid.replicas)
        config = self.deepspeed_config(largest)
        self.zero_stage = zero_stage(config)
        if self.speed.compile_blocks:
            require_compilable(self.family, self.packs, self.zero_stage, self.trained, device)
        probe = None
        if self.family in FAMILIES:
            init = zero_init(config, grid, DTYPES[dtype], self.trained) if self.zero_stage == 3 else None
            model, self.load_report = load_divided(
                self.folder, self.kind, dtype, grid, device, init, self.trained, description.random_seed
            )
        elif description.random_seed is not None:
            raise BackboneError(
                f"backbone.random_weights is not available for {self.family!r}, only for {', '.join(FAMILIES)}"
            )
        else:
            model, self.load_report, probe = load_whole(self.folder, self.kind, dtype, device)
        self.num_parameters = self.load_report.num_parameters
        self.vocabulary_size, self.width = self.load_report.embedding_shape
        first_id, _ = vocabulary_range(self.vocabulary_size, grid.shard, grid.shards)
        self.module = self.take_apart(model, first_id).eval()
        if self.zero_stage == 0:
            _group_gradients(self.module)
        elif not self.trained:
            keep_no_inputs(self.module)
        cuts = self.packs and self.speed.cut_last_block
        if cuts and self.module.reading is not None:
            cut_last_block(model, FAMILIES[self.family], self.module.reading)
        if self.speed.compile_blocks:
            blocks = [block for _, block in blocks_of(model, FAMILIES[self.family])]
            compile_blocks(blocks[:-1] if cuts else blocks)
        if parallel.activation_checkpointing:
            checkpoint_activations(model, self.family)
        roll_call.mark("handing the backbone to DeepSpeed")
        self.engine = self.start_engine(config)
        self.output = OutputEmbedding(
            self.module.head, self.vocabulary_size, description.unused_ids, grid, frozen=not self.trained
        )
        if probe is not None:
            self._check_probe(*probe)
        first = grid.replica == grid.shard == 0
        rows = agree(rows_checksum(self.folder, description.random_seed) if first else None)
        self.fingerprint = Fingerprint(rows, probe_scores(self), dtype)
        self.contexts: ContextCache | None = None

    def deepspeed_config(self, largest_share: int) -> dict[str, Any]:
        return frozen_backbone_config(self.parallel, self.dtype, largest_share, pinned=self.device.type == "cuda")

    def take_apart(self, model: Any, first_id: int) -> PromptedBackbone:
        return PromptedBackbone(model, self.grid, first_id).requires_grad_(False)

    def start_engine(self, config: dict[str, Any]) -> Any:
        return start_engine(self.module, config, self.grid)

    @contextlib.contextmanager
    def dropout(self, seed: int | None) -> Iterator[None]:
        """The model's own dropout at work within, with masks from ``seed``; None: none, as everywhere else."""
        if seed is None:
            yield
            return
        assert not self.packs, "the configuration's rules"
        self.module.train()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            try:
                yield
            finally:
                self.module.eval()

    @property
    def packs(self) -> bool:
        """Whether a saving asks for packed batches, which are read at the answers alone, and the family takes them."""
        return self.speed.packs and self.family in FAMILIES

    @property
    def deep(self) -> DeepPrompts | None:
        """The shape of deep prompts; None where attention is not ours to put them into."""
        return self.module.deep

    def lay_out(
        self,
        slots: list[list[int]],
        answers: Positions,
        groups: list[int],
        pad_id: int,
        keeps: bool = True,
        first_rows: list[int] | None = None,
        virtual_tokens: int = 0,
    ) -> Inputs:
        """Examples as this host reads them: packed where a saving asks for it and the family is known.

        :param answers: each example's answer positions. :param groups: as in :func:`pack`.
        :param keeps: whether kept contexts are used, instead of leads that the batch shares.
        :param virtual_tokens: of the examples' deep prompts, if these have such, whose first rows in the table are
            ``first_rows``. They are always packed.
        """
        masked, speed = self.kind == "masked", self.speed
        prefix: dict[str, Any] = {"share_leads": speed.share_leading_tokens and not masked}
        if virtual_tokens:
            assert self.deep is not None, "preparation refuses other families"
            assert first_rows is not None
            prompts = [row // (virtual_tokens * self.deep.rows) for row in first_rows]
            prefix |= {"prompts": prompts, "virtual_tokens": virtual_tokens}
        elif not self.packs:
            return pad(slots, answers, pad_id, masked, self.device)
        else:
            prefix["contexts"] = self.contexts.lengths(slots) if self.contexts is not None and keeps else None
        filled = None if speed.packing else pad_id
        return pack(slots, answers, groups, masked=masked, device=self.device, pad_id=filled, **prefix)

    def features(self, inputs: Inputs, table: Tensor, everywhere: bool = False) -> Tensor:
        """Features [B, D] that score the answers (one for every position that is read, in the order of the examples),
        or of a padded batch those of all positions [B, T, D]; differentiable in ``table`` [R, D] (fp32) only; with deep
        prompts that is [R, k * E]."""
        kept = None
        if isinstance(inputs, Packed) and inputs.contexts is not None and self.contexts is not None:
            kept = self.contexts.gather(inputs.contexts)
        return self.engine.module(inputs, table, kept, everywhere)

    def keep_contexts(self, slots: list[list[int]], groups: list[int], folder: Path | None) -> None:
        """Compute what precedes the first pseudo token of examples that will be read many times, and keep it.

        Collective. :param groups: as in :func:`pack`. :param folder: where files may be kept for a resumed run.
        """
        if self.trained or self.kind == "masked" or not (self.packs and self.speed.context_cache):
            return
        if self.contexts is None:
            shard = f"{self.fingerprint.digest}-{self.dtype}-{self.grid.shard}of{self.grid.shards}"
            files = None if folder is None else folder / shard
            one = pack([[0]], [0], [0], masked=False, device=self.device)
            size = self._keys_and_values(one).nbytes
            self.contexts = ContextCache(self._keys_and_values, size, self.device, self.grid, self.speed, files)
        self.contexts.keep(worth_keeping(slots, groups))

    @torch.no_grad()
    def _keys_and_values(self, packed: Packed) -> Tensor:
        """Of every token of a packed batch [L, 2, heads, N, head width]."""
        table = torch.zeros(0, self.width, device=self.device)
        return self.engine.module(packed, table, record=True)

    def deep_prompt_of(self, ids: list[int]) -> Tensor:
        """What the model itself makes of tokens, as rows of a deep prompt [P * 2 L, k * E] fp32; collective."""
        assert self.deep is not None, "preparation refuses other families"
        masked = self.kind == "masked"
        packed = pack([ids], [len(ids) - 1], [0], masked=masked, device=self.device)
        return self.deep.rows_of(self._keys_and_values(packed), self.grid)

    def output_rows(self, ids: Tensor | None = None) -> OutputRows:
        """This rank's rows of the output embedding for the candidates ``ids``; of the whole vocabulary for None."""
        return self.output.rows(ids)

    @torch.no_grad()
    def _check_probe(self, ids: Tensor, expected: Tensor) -> None:
        """The hosted model, read our way, gives the plain model's logits."""
        ids = ids.to(self.device)
        last = torch.tensor([ids.shape[1] - 1], device=self.device)
        table = torch.zeros(0, self.width, device=self.device)
        features = self.features(Padded(ids, None, last), table)
        rows = self.output_rows()
        unsupported = f"unsupported architecture {self.family!r}: its answer scores are not features times output "
        if not torch.isfinite(expected).all():
            raise BackboneError(f"{self.folder}: the model's scores are not finite; its weights are damaged")
        weight = rows.weight
        if features.shape[1] != weight.shape[1]:
            widths = f"widths {features.shape[1]} and {weight.shape[1]}"
            raise BackboneError(f"{unsupported}embedding ({widths})")
        logits = features.float() @ weight.float().T
        if rows.bias is not None:
            logits = logits + rows.bias.float()
        error = (logits[0].cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        if error > PROBE_TOLERANCE[self.dtype]:
            raise BackboneError(f"{unsupported}embedding (a probe differs by {error:.1e} of the largest score)")


@torch.no_grad()
def probe_scores(host: BackboneHost) -> tuple[float, ...]:
    """Scores of 32 ids, spread over the vocabulary, at the last of five fixed tokens; every rank takes part."""
    ids = probe_ids(host.vocabulary_size).to(host.device)
    places = torch.linspace(0, host.vocabulary_size - 1, min(PROBE_SCORES, host.vocabulary_size)).long().unique()
    last = torch.tensor([ids.shape[1] - 1], device=host.device)
    features = host.features(Padded(ids, None, last), torch.zeros(0, host.width, device=host.device))
    rows = host.output_rows(places)
    scores = features.new_zeros(len(places), dtype=torch.float32)
    mine = (features.float() @ rows.weight.float().T)[0]
    scores[rows.index] = mine if rows.bias is None else mine + rows.bias.clamp(min=-1e4).float()
    if host.grid.shards > 1:
        torch.distributed.all_reduce(scores, group=host.grid.tensor_group)
    return tuple(scores.tolist())


def _group_gradients(module: nn.Module) -> None:
    """Sum a tensor's gradient module by module, as ZeRO-3's hooks do.

    Where a hidden state has several readers (a norm's two uses and the residual), autograd adds their gradients in the
    order of the graph. ZeRO-3 passes every module a view of its inputs; the same views here give the same order, so
    both stages agree bit by bit and Adam has no rounding to amplify.
    """

    def pass_views(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)

    for inner in module.modules():
        inner.register_forward_pre_hook(pass_views)


def checkpoint_activations(model: Any, family: str) -> None:
    """Keep a block's input alone and compute the block again in backward.

    Reentrant, because torch's other form compares the tensors that both passes save, and ZeRO 3 has partitioned frozen
    weights in between.
    """
    if family not in FAMILIES:
        raise BackboneError(
            f"parallel.activation_checkpointing is not available for {family!r}, only for {', '.join(FAMILIES)}"
        )
    for _, block in blocks_of(model, FAMILIES[family]):
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Any) -> Any:
    def run(hidden_states: Tensor, *inputs: Any, **named: Any) -> Any:
        deep = forward.reading.deep if isinstance(forward, BlockForward) else None
        prompts = None if deep is None else deep[forward.number]

        def block(hidden: Tensor, prompts: Tensor | None) -> Any:
            if (
                deep is not None and prompts is not None
            ):  # what the block reads must be its input, or its gradient would pass by
                deep[forward.number] = prompts
            return forward(hidden, *inputs, **named)

        wanted = hidden_states.requires_grad or (prompts is not None and prompts.requires_grad)
        if not (torch.is_grad_enabled() and wanted):
            return block(hidden_states, prompts)
        return checkpoint(block, hidden_states, prompts, use_reentrant=True, preserve_rng_state=False)

    return run
