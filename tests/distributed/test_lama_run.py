"""A LAMA run from start to table: relations and seeds in one launch, on a tiny folder in the official layout."""

import json
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from ranks import run_ranks, train
from runs import metrics
from tiny import CAPITALS, UNKNOWN_WORD, write_config, write_jsonl
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.dist

SHORT = ["Italy", "Spain", "Norway", "Wonderland"]
"""A word list that leaves records out of its reading, not out of the run."""


def lama_folder(root: Path) -> Path:
    """P17 and P30 (reversed, so that its numbers differ), with a word outside the list and one of several tokens."""
    relations = [
        {"relation": "P17", "template": "[X] is in [Y] .", "label": "country"},
        {"relation": "P30", "template": "[X] lies near [Y] .", "label": "neighbour"},
    ]
    write_jsonl(root / "relations.jsonl", relations)
    facts = list(CAPITALS.items())
    for relation, pairs in (("P17", facts), ("P30", facts[::-1][:14])):
        rows = [{"sub_label": city, "obj_label": country, "uuid": "x", "evidences": [{}]} for city, country in pairs]
        copied = {"sub_label": "old Italy river", "obj_label": "Italy"}
        for split, members in (("train", rows), ("dev", rows[:4]), ("test", [*rows[4:], copied])):
            extra = [{"sub_label": "Rome", "obj_label": UNKNOWN_WORD}, {"sub_label": "Oslo", "obj_label": "Sweden"}]
            write_jsonl(root / "fact-retrieval" / "original" / relation / f"{split}.jsonl", members + extra)
    lpaqa = ("P17", "near [X] [Y]"), ("P17", "[X] is the capital of [Y]."), ("P30", "[Y] has [X]")
    autoprompt = ("P17", "[X]old river city [Y]."), ("P30", "[X] market harbour [Y].")
    for name, prompts in (("LPAQA", lpaqa), ("AutoPrompt", autoprompt)):
        rows = [{"relation": relation, "template": text} for relation, text in prompts]
        write_jsonl(root / "prompts" / f"{name}_relations.jsonl", rows)
    words = [*sorted(set(CAPITALS.values())), UNKNOWN_WORD]
    (root / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (root / "short.txt").write_text("\n".join(SHORT) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lama")
    root = lama_folder(folder / "LAMA")
    config = write_config(
        folder,
        backbone={"path": str(tiny("gpt2"))},
        task={
            "type": "lama",
            "root": str(root),
            "word_list": str(root / "words.txt"),
            "word_lists": {"short": "LAMA/short.txt"},
            "name": None,
            "answer": None,
        },
        prompt={"template": "[P*3] {subject} [P*3] [answer]", "manual": None},
        methods=["manual", "manual_lpaqa", "manual_autoprompt", "ptuning"],
        scoring={
            "evaluate_over": ["answers", "word_list", "short", "vocabulary", "answers_multi"],
            "select_on": "word_list",
        },
    )
    text = (
        config.read_text()
        .replace("  name: null\n", "")
        .replace("  answer: null\n", "")
        .replace("  subject: city\n", "")
    )
    config.write_text(text)
    run_ranks(2, train, config, "run.seeds=[0,1]")
    return folder / "run"


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run / "results.json").read_text())


def test_records_lost_to_the_word_list_and_to_the_one_token_rule_are_counted(results):
    job = next(job for job in results["jobs"] if job["task"] == "P17")
    assert job["dropped"] == {"answer outside task.word_list": 3, "answer of several tokens": 3}
    assert job["counts"] == {"train": 16, "dev": 4, "test": 13}


def test_every_relation_has_its_jobs(results):
    jobs = {(job["task"], job["method"], job["seed"]) for job in results["jobs"]}
    wanted = {(task, method, None) for task in ("P17", "P30") for method in ("manual", "manual_autoprompt")}
    wanted |= {("P17", "manual_lpaqa", None)}  # P30's is not for a causal model
    assert jobs == wanted | {(task, "ptuning", seed) for task in ("P17", "P30") for seed in (0, 1)}


@pytest.mark.parametrize("reading", ["answers", "word_list", "vocabulary"])
def test_macro_and_micro_are_means_over_relations_and_over_records(results, reading):
    def score(task, method, seed=None):
        (job,) = [j for j in results["jobs"] if (j["task"], j["method"], j["seed"]) == (task, method, seed)]
        return job["test"][reading]["p_at_1"], job["counts"]["test"]

    rows = {row["relation"]: row for row in results["table"] if row["reading"] == reading}
    macro, micro = rows["macro average of 2"], rows["micro average of 2"]
    (p17, n17), (p30, n30) = score("P17", "manual"), score("P30", "manual")
    assert macro["manual"]["mean"] == pytest.approx((p17 + p30) / 2)
    assert micro["manual"]["mean"] == pytest.approx((p17 * n17 + p30 * n30) / (n17 + n30))
    per_seed = [(score("P17", "ptuning", seed)[0] + score("P30", "ptuning", seed)[0]) / 2 for seed in (0, 1)]
    assert macro["ptuning"]["mean"] == pytest.approx(mean(per_seed))
    assert macro["ptuning"]["sd"] == pytest.approx(stdev(per_seed))


def test_figures_are_those_of_the_predictions(run, results):
    for job in results["jobs"]:
        folder = run / "jobs" / job["task"] / (job["method"] if job["seed"] is None else f"ptuning-seed{job['seed']}")
        ranks = [json.loads(line)["rank"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
        figures = job["test"]["word_list"]
        assert figures["p_at_1"] == pytest.approx(mean(rank <= 1 for rank in ranks))
        assert figures["p_at_5"] == pytest.approx(mean(rank <= 5 for rank in ranks))
        assert figures["mrr"] == pytest.approx(mean(1 / rank for rank in ranks))


def test_the_markdown_table_has_the_same_rows(run, results):
    first, _, second = (run / "results.md").read_text().partition("## Easy and hard facts (word_list)")
    for text, rows in ((first, results["table"]), (second, results["difficulty"])):
        assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + len(rows) > 2


def test_the_test_split_is_scored_once_a_job(run):
    scored = [(line["job"], line["reading"]) for line in metrics(run) if line["kind"] == "test"]
    assert len(scored) == len(set(scored)) == 9 * 5


def plain_p_at_1(folder, tokenizer, prompt, facts, words):
    """P@1 over one-token words, with transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    listed = [ids[0] for ids in (tokenizer.encode(" " + word) for word in words) if len(ids) == 1]
    right = 0
    for city, country in facts:
        logits = model(torch.tensor([tokenizer.encode(prompt.format(city))])).logits[0, -1, listed]
        right += listed[int(logits.argmax())] == tokenizer.encode(" " + country)[0]
    return right / len(facts)


def test_a_further_word_list_counts_the_records_whose_answer_is_on_it(run, results, tiny, tokenizers):
    facts = [*list(CAPITALS.items())[4:], ("old Italy river", "Italy")]
    counted = [(city, country) for city, country in facts if country in SHORT]
    jobs = {job["method"]: job for job in results["jobs"] if job["task"] == "P17"}
    figures = jobs["manual"]["test"]["short"]
    expected = plain_p_at_1(tiny("gpt2"), tokenizers("gpt2"), "{} is in", counted, SHORT)
    assert (figures["count"], figures["p_at_1"]) == (len(counted), pytest.approx(expected))
    row = next(row for row in results["table"] if (row["relation"], row["reading"]) == ("P17", "short"))
    assert (row["candidates"], row["test"]) == (3, len(counted))
    assert row["in_subject"] == pytest.approx(1 / len(counted))


def test_easy_and_hard_facts_are_told_apart(run, results):
    """Easy is what stands in the subject, or has the answer France, train's commonest, which no test record has."""
    rows = {(row["relation"], row["reading"]): row for row in results["difficulty"]}
    lines = [json.loads(line) for line in (run / "jobs/P17/manual/predictions.jsonl").read_text().splitlines()]
    hits = {part: [line["rank"] == 1 for line in lines if ("Italy" in line["subject"]) == (part == "easy")]
            for part in ("easy", "hard")}  # fmt: skip
    for part, found in hits.items():
        assert rows["P17", part]["test"] == len(found)
        assert rows["P17", part]["manual"]["mean"] == pytest.approx(mean(found))
    assert rows["P17", "easy"]["in_subject"] == 1.0
    macro = mean(rows[relation, "hard"]["manual"]["mean"] for relation in ("P17", "P30"))
    assert rows["macro average of 2", "hard"]["manual"]["mean"] == pytest.approx(macro)


def test_records_with_answers_of_several_tokens_are_regained(run, results):
    jobs = {job["method"]: job for job in results["jobs"] if job["task"] == "P17" and job["seed"] in (None, 0)}
    assert set(jobs) == {"manual", "manual_lpaqa", "manual_autoprompt", "ptuning"}
    for job in jobs.values():
        assert job["test"]["answers_multi"]["count"] == 14  # 13 of one token
        assert (job["answers_multi"]["one_token"]["count"], job["answers_multi"]["regained"]["count"]) == (13, 1)
        assert job["candidates"]["answers_multi"] == job["candidates"]["answers"] + 1
        # A random model gives 14 tokens in a row next to no probability, so one token is answered as without them.
        assert job["answers_multi"]["one_token"]["p_at_1"] == pytest.approx(job["test"]["answers"]["p_at_1"])
    row = next(row for row in results["table"] if (row["relation"], row["reading"]) == ("P17", "answers_multi"))
    assert (row["test"], row["candidates"]) == (14, 9)
    assert "of its 26 test records 2 have an answer of several tokens" in (run / "results.md").read_text()
    lines = (run / "jobs/P17/manual/predictions_multi.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines].count(UNKNOWN_WORD) == 1


def test_of_several_prompts_the_best_on_dev_is_scored(results, tiny, tokenizers):
    """Dev computed once more, with transformers alone: P17's dev facts are the first four of CAPITALS."""
    facts, words = list(CAPITALS.items())[:4], sorted(set(CAPITALS.values()))
    prompts = {"near {subject} [answer]": "near {}", "{subject} is the capital of [answer].": "{} is the capital of"}
    scores = {
        template: plain_p_at_1(tiny("gpt2"), tokenizers("gpt2"), prompt, facts, words)
        for template, prompt in prompts.items()
    }
    (job,) = [job for job in results["jobs"] if job["method"] == "manual_lpaqa"]
    assert len(set(scores.values())) == 2, "prompts that dev tells apart"
    assert job["template"] == max(scores, key=lambda template: scores[template])
    assert (job["best_dev_p_at_1"], job["prompts_tried"]) == (max(scores.values()), 2)


def test_a_column_says_for_which_relations_it_has_no_prompt(run, results):
    rows = {row["relation"]: row for row in results["table"] if row["reading"] == "word_list"}
    assert rows["P30"]["manual_lpaqa"] is None
    assert rows["macro average of 2"]["manual_lpaqa"]["mean"] == rows["P17"]["manual_lpaqa"]["mean"]
    assert rows["macro average of 2"]["fewer_relations"] == {"manual_lpaqa": 1}
    assert "fewer_relations" not in rows["P17"]
    text = (run / "results.md").read_text()
    assert " (1) | " in text
    assert "LPAQA without P30: its prompt has the answer before the subject" in text
