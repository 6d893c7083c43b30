"""megaptune against the paper stated again in plain PyTorch, and against PEFT's prompt encoder.

The statement below shares no code with the package: one process, a padded batch, full logits at every position,
transformers' own forward, torch's own loss. Tolerance 1e-5 of the largest entry: fp32 with another order of sums.
"""

import json

import pytest
import torch
from ranks import run_ranks
from torch import nn

from megaptune.batches import EpochPlan, Member, collate, micro_batches
from megaptune.config import PromptConfig, TrainConfig, load_config
from megaptune.prompts.encoder import build_encoder

ROWS = 3


class PaperEncoder(nn.Module):
    """Liu et al. 2021, section 2.2: h_i = MLP([LSTM forward : LSTM backward](embedding_i))."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(rows, width))
        self.bilstm = nn.LSTM(width, width // 2, 2, bidirectional=True)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self) -> torch.Tensor:
        states, _ = self.bilstm(self.start.unsqueeze(1))
        return self.second(torch.relu(self.first(states.squeeze(1))))


def paper_encoder_with_weights_of(encoder: nn.Module, width: int) -> PaperEncoder:
    paper = PaperEncoder(ROWS, width)
    source = encoder.state_dict()
    target = {
        "start": source["embedding.weight"],
        "first.weight": source["mlp.0.weight"],
        "first.bias": source["mlp.0.bias"],
    }
    target |= {"second.weight": source["mlp.2.weight"], "second.bias": source["mlp.2.bias"]}
    target |= {name.replace("lstm.", "bilstm."): value for name, value in source.items() if name.startswith("lstm.")}
    paper.load_state_dict(target)
    return paper


def plain_step(model, tokenizer, kind, facts, prompts):
    """Mean loss of P-tuning with the template ``[P*2] {city} [P] [answer] .`` (causal: cut at the answer)."""
    embed = model.get_input_embeddings()
    pieces, answers, places = [], [], []
    for fact in facts:
        city = tokenizer(" " + fact["city"] if kind != "bert" else fact["city"], add_special_tokens=False)["input_ids"]
        word = " " + fact["country"] if kind != "bert" else fact["country"]
        (answer,) = tokenizer(word, add_special_tokens=False)["input_ids"]
        before = {"llama": [tokenizer.bos_token_id], "gpt2": []}.get(kind, [tokenizer.cls_token_id])
        parts = [embed(torch.tensor(before, dtype=torch.long)), prompts[:2], embed(torch.tensor(city)), prompts[2:]]
        if kind in ("llama", "gpt2"):
            places.append(sum(len(part) for part in parts) - 1)  # the next token is the answer
        else:
            places.append(sum(len(part) for part in parts))  # the mask token stands where the answer goes
            (stop,) = tokenizer(" ." if kind != "bert" else ".", add_special_tokens=False)["input_ids"]
            parts.append(embed(torch.tensor([tokenizer.mask_token_id, stop, tokenizer.sep_token_id])))
        pieces.append(torch.cat(parts))
        answers.append(answer)
    lengths = torch.tensor([len(piece) for piece in pieces])
    padded = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    logits = model(inputs_embeds=padded, attention_mask=mask.long()).logits
    at_answers = logits[torch.arange(len(facts)), torch.tensor(places)]
    return nn.functional.cross_entropy(at_answers, torch.tensor(answers))


def _trained_by_megaptune(config_path, learning_rate):
    """Gradient of the first step, then three SGD steps: losses, weights and batch order."""
    from hosting import open_host

    from megaptune.experiment import Experiment
    from megaptune.preparation import prepare_run
    from megaptune.run.directory import RunDirectory
    from megaptune.run.monitor import Monitor
    from megaptune.run.stopping import StopRequest
    from megaptune.run.topology import Topology, disconnect
    from megaptune.scoring import Scorer
    from megaptune.trainer import Trainer

    config = load_config(config_path)
    monitor = Monitor(False)
    prepared = prepare_run(config, monitor)
    host, topology = open_host(prepared.backbone.folder), Topology()
    directory = RunDirectory(config.run.directory)
    experiment = Experiment(prepared, topology, directory, monitor, StopRequest(None), host)
    task = prepared.tasks[0]
    scorers = {"vocabulary": Scorer(host, None)}
    folder = directory.job("cities", "ptuning", 0)
    trainer = Trainer(
        config, 0, "job", host, topology, task.tuned, scorers, prepared.pad_id, monitor, folder, experiment.stop
    )
    start = {name: value.clone() for name, value in trainer.prompt.encoder.state_dict().items()}
    gradient, _ = trainer.gradient(trainer.batches.indices(0), trainer.prompt.vectors())
    losses, orders = [], []
    for step in range(3):
        orders.append(trainer.batches.indices(step))
        sums = trainer.train_step()
        losses.append(sums.loss / sums.examples)
    disconnect()
    return start, gradient, losses, orders, trainer.prompt.encoder.state_dict(), trainer.prompt.vectors()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "roberta"])
def test_losses_gradients_and_weights_match_a_plain_restatement(kind, config_file, tiny, facts, tokenizers):
    """SGD, because Adam hides a wrong scale."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    rate = 0.5
    train = {"optimizer": "sgd", "learning_rate": rate, "weight_decay": 0.01, "schedule": "constant"}
    config = config_file(kind, train=train, methods=["ptuning"])
    [(start, gradient, losses, orders, weights, vectors)] = run_ranks(1, _trained_by_megaptune, config, rate)

    auto = AutoModelForCausalLM if kind in ("llama", "gpt2") else AutoModelForMaskedLM
    model = auto.from_pretrained(tiny(kind)).eval().requires_grad_(False)
    records = [json.loads(line) for line in facts["train"].read_text().splitlines()]
    width = model.get_input_embeddings().weight.shape[1]
    ours = build_encoder("lstm", ROWS, width, 0.0, 0)
    assert all(torch.equal(start[name], value) for name, value in ours.state_dict().items())
    paper = paper_encoder_with_weights_of(ours, width)
    optimizer = torch.optim.SGD(paper.parameters(), lr=rate, weight_decay=0.01)
    for step, order in enumerate(orders):
        prompts = paper()
        loss = plain_step(model, tokenizers(kind), kind, [records[index] for index in order], prompts)
        assert losses[step] == pytest.approx(loss.item(), rel=1e-5)
        if step == 0:
            (expected,) = torch.autograd.grad(loss, prompts, retain_graph=True)
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(vectors, paper().detach(), rtol=0, atol=1e-5 * float(vectors.abs().max()))
    torch.testing.assert_close(weights["mlp.2.bias"], paper.second.bias.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_nothing_clips_the_update(scale):
    """update = learning rate x gradient, also where the gradient's norm is far above DeepSpeed's default limit of 1."""
    from megaptune.prompts.soft_prompt import SoftPrompt

    settings = TrainConfig(optimizer="sgd", learning_rate=0.1, weight_decay=0.0, schedule="constant")
    prompt = SoftPrompt(ROWS, 8, PromptConfig(encoder="table"), settings, 1, 0, torch.device("cpu"))
    before, gradient = prompt.vectors(), scale * torch.ones(ROWS, 8)
    norm = prompt.apply(prompt.table(), gradient)
    assert norm == pytest.approx(float(gradient.norm()))
    torch.testing.assert_close(before - prompt.vectors(), 0.1 * gradient, rtol=1e-5, atol=1e-6)


def test_lstm_encoder_gives_the_vectors_of_pefts_prompt_encoder():
    """PEFT's sizes match the paper's when encoder_hidden_size is half the width."""
    from peft import PromptEncoder, PromptEncoderConfig, PromptEncoderReparameterizationType

    rows, width = 6, 32
    settings = PromptEncoderConfig(
        peft_type="P_TUNING",
        task_type="CAUSAL_LM",
        num_virtual_tokens=rows,
        num_transformer_submodules=1,
        token_dim=width,
        encoder_hidden_size=width // 2,
        encoder_num_layers=2,
        encoder_reparameterization_type=PromptEncoderReparameterizationType.LSTM,
    )
    theirs = PromptEncoder(settings)
    ours = build_encoder("lstm", rows, width, 0.0, 3)
    names = {"embedding": "embedding", "lstm": "lstm_head", "mlp": "mlp_head"}
    theirs.load_state_dict(
        {
            ".".join([names[name.split(".")[0]], *name.split(".")[1:]]): value
            for name, value in ours.state_dict().items()
        }
    )
    expected = theirs(torch.arange(rows).unsqueeze(0)).squeeze(0)
    torch.testing.assert_close(ours(), expected, rtol=1e-6, atol=1e-7)


def test_padding_does_not_reach_the_answers(config_file, tiny):
    """A batch padded to its longest member gives each example what it gets alone."""
    from megaptune.preparation import prepare_run
    from megaptune.run.monitor import Monitor

    for kind in ("llama", "bert"):
        prepared = prepare_run(load_config(config_file(kind)), Monitor(False))
        examples = prepared.tasks[0].tuned.train
        plan = EpochPlan(len(examples), 8, False, 0)
        (piece,) = micro_batches([len(e.slots) for e in examples], plan.indices(0), 8)
        assert len({len(examples[index].slots) for index in piece}) > 1
        together, alone = run_ranks(1, _features, tiny(kind), [examples[index] for index in piece], prepared.pad_id)[0]
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def _features(folder, examples, pad_id):
    from hosting import open_host

    from megaptune.run.topology import disconnect

    host = open_host(folder)
    table = torch.randn(ROWS, host.width, generator=torch.Generator().manual_seed(1))

    def features(members):
        batch = collate([Member(example) for example in members], host, pad_id, Member(members[0]))
        with torch.no_grad():
            return host.features(batch.inputs, table)

    together = features(examples)
    alone = torch.cat([features([example]) for example in examples])
    disconnect()
    return together, alone
