"""One P-tuning step, side by side in one run: this project against the released code's way of computing it.

    python benchmarks/step.py [--backbone FOLDER] [--rounds 5]

The released way (THUDM/P-tuning, LAMA) computes vocabulary logits at every position and sorts them; the statement of
it here is ours. Both do forward, backward to the table, and the encoder's Adam step, on the same inputs in one thread.
Rounds alternate; the median of process time is printed, and the ratio. Absolute times mean little on a shared machine.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from megaptune.backbone.description import describe_backbone, load_tokenizer
from megaptune.backbone.embedded import embedded_folder
from megaptune.backbone.host import BackboneHost
from megaptune.batches import Batch, collate
from megaptune.config import ParallelConfig, PromptConfig, TrainConfig
from megaptune.examples import Example
from megaptune.prompts.bank import Prompt, PromptBank
from megaptune.prompts.template import Template
from megaptune.prompts.tokens import TokenForms
from megaptune.run.grid import ProcessGrid
from megaptune.run.topology import connect, disconnect
from megaptune.scoring import Scorer
from megaptune.tasks.records import Record

FACTS = Path(__file__).resolve().parents[1] / "configs/facts/city_continent/train.jsonl"
BATCH = 32


def batches(host: BackboneHost, tokenizer: object, template: Template) -> list[Batch]:
    """The shipped facts in batches of 32, in file order."""
    forms = TokenForms(tokenizer)
    examples = []
    for line in FACTS.read_text(encoding="utf-8").splitlines():
        fact = json.loads(line)
        record = Record({"city": fact["city"]}, fact["continent"], "")
        prompt = template.encode(record, forms)
        (answer,) = forms.after_space(fact["continent"])
        examples.append(Example(prompt.slots, prompt.answer_position, answer, record))
    chunks = [examples[start : start + BATCH] for start in range(0, len(examples), BATCH)]
    return [collate(chunk, 0, host.kind == "masked", host.device, chunk[0]) for chunk in chunks]


def our_loss(host: BackboneHost, scorer: Scorer, batch: Batch, table: Tensor) -> Tensor:
    features = host.features(batch.slots, batch.attention_mask, batch.answer_positions, table)
    return scorer(features, batch.answers)[0].mean()


def released_loss(host: BackboneHost, batch: Batch, table: Tensor) -> Tensor:
    """Vectors written in by a Python loop, an attention mask, logits everywhere, a full sort for the hits."""
    embeds = nn.functional.embedding(batch.slots.clamp(min=0), host.module.vocabulary).clone()
    for row, column in (batch.slots < 0).nonzero().tolist():
        embeds[row, column] = table[-1 - int(batch.slots[row, column])]
    mask = torch.arange(batch.slots.shape[1]) <= batch.answer_positions[:, None]
    hidden = host.module.body(inputs_embeds=embeds, attention_mask=mask.long(), use_cache=False).last_hidden_state
    logits = hidden @ host.module.head.weight.T
    logits.detach().argsort(dim=-1, descending=True)
    at_answers = logits[torch.arange(len(logits)), batch.answer_positions]
    return nn.functional.cross_entropy(at_answers, batch.answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, help="a causal LM's folder; default: the embedded SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    folder = arguments.backbone or embedded_folder(print)
    topology = connect()
    torch.set_num_threads(1)
    host = BackboneHost(describe_backbone(folder, "causal"), "fp32", ParallelConfig(), ProcessGrid(), topology.device)
    scorer = Scorer(host, [None])
    settings = TrainConfig()
    bank = PromptBank(host.width, PromptConfig(), settings, {6: 1}, host.device, topology, sharded=False)
    bank.add(Prompt("prompt", 6, 0, settings.learning_rate, 100))
    data = batches(host, load_tokenizer(folder), Template("[P*3] {city} [P*3] [answer]", "causal"))
    ways = {
        "megaptune": lambda batch, table: our_loss(host, scorer, batch, table),
        "released": lambda batch, table: released_loss(host, batch, table),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, loss_of in ways.items():
            batch = data[turn % len(data)]
            begin = time.process_time()
            table = bank.table()
            leaf = table.clone().requires_grad_()
            loss_of(batch, leaf).backward()
            assert leaf.grad is not None
            bank.step(leaf.grad)
            if turn:  # the first turn warms up
                seconds[name].append(time.process_time() - begin)
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{name:10} {median:.2f} s a step of {BATCH} (median of {len(taken)}), {BATCH / median:.1f} examples/s")
    ratios = [slow / fast for slow, fast in zip(seconds["released"], seconds["megaptune"], strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"released / megaptune: median {statistics.median(ratios):.2f} ({spread})")
    disconnect()


if __name__ == "__main__":
    main()
