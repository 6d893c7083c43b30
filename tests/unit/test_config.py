"""The configuration: what a key defaults to, how files are layered, and what a mistake is told as."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from megaptune.config import Config, load_config, validate
from megaptune.errors import ConfigError
from megaptune.methods import METHODS, MethodName

MINIMAL: dict[str, Any] = {
    "backbone": {"path": "backbone"},
    "task": {"type": "custom", "train": "a.jsonl", "dev": "b.jsonl", "test": "c.jsonl", "answer": "country"},
    "prompt": {"manual": "{city} is in [answer]"},
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(text)`` or ``write(mapping, name)``: a configuration file, and the folder it needs."""

    def write(content: str | dict[str, Any], name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def with_keys(**sections: Any) -> dict[str, Any]:
    """MINIMAL with sections laid over it."""
    raw = {name: dict(section) for name, section in MINIMAL.items()}
    for name, section in sections.items():
        raw[name] = {**raw[name], **section} if isinstance(section, dict) and name in raw else section
    return raw


def problems(raw: dict[str, Any]) -> str:
    """The message that ``raw`` is refused with."""
    with pytest.raises(ConfigError) as caught:
        validate(raw, "config.yaml")
    return str(caught.value)


# -- defaults --------------------------------------------------------------------------------------------------------


def test_plain_vectors_may_have_a_rate_of_their_own():
    rates = {}
    for train in ({}, {"table_learning_rate": 0.1}):
        config = validate(with_keys(train=train, prompt={"deep": {"encoder": "mlp"}}), "config.yaml")
        for name in ("ptuning", "prompt_tuning", "deep_ptuning"):
            rates.setdefault(name, []).extend(config.learning_rates(METHODS[name]))
    assert rates == {"ptuning": [1e-5, 1e-5], "prompt_tuning": [1e-5, 0.1], "deep_ptuning": [1e-5, 1e-5]}
    tables = {"encoder": "table", "deep": {"encoder": "table"}}
    config = validate(with_keys(train={"table_learning_rate": 0.1}, prompt=tables), "config.yaml")
    assert config.learning_rates(METHODS["ptuning"]) == config.learning_rates(METHODS["deep_ptuning"]) == [0.1]


def test_a_sweep_of_rates_is_for_every_prompt():
    config = validate(with_keys(train={"table_learning_rate": 0.1}, jobs={"learning_rates": [0.2, 0.3]}), "config.yaml")
    assert config.learning_rates(METHODS["ptuning"]) == config.learning_rates(METHODS["prompt_tuning"]) == [0.2, 0.3]


def test_training_defaults_are_the_papers():
    train = validate(MINIMAL, "config.yaml").train
    assert train.optimizer == "adam"
    assert train.learning_rate == 1e-5
    assert train.weight_decay == 5e-4
    assert (train.schedule, train.decay_per_epoch) == ("exponential", 0.98)
    assert train.global_batch == 8
    assert train.epochs == 100
    assert train.patience == 20
    assert train.max_gradient_norm is None
    assert train.warmup_steps == 0


def test_prompt_defaults_are_the_papers():
    prompt = validate(with_keys(prompt={}), "config.yaml").prompt
    assert prompt.template == "[P*3] {subject} [P*3] [answer] [P*3]"
    assert (prompt.encoder, prompt.dropout) == ("lstm", 0.0)


def test_lama_drops_answers_of_several_tokens_and_a_custom_task_refuses_them():
    lama = validate({"backbone": {"path": "b"}, "task": {"type": "lama", "root": "LAMA"}}, "config.yaml")
    assert lama.task.multi_token_answers == "drop"
    assert validate(MINIMAL, "config.yaml").task.multi_token_answers == "error"


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_readings_are_those_that_have_a_name():
    lists = {"type": "custom", "word_lists": {"29k": "a.txt"}}
    assert validate(with_keys(task=lists, scoring={"evaluate_over": ["29k", "vocabulary"]}), "c").task.word_lists
    told = problems(with_keys(task=lists, scoring={"evaluate_over": ["34k", "vocabulary"]}))
    assert "'34k' is no reading; expected answers, word_list, vocabulary, answers_multi, 29k" in told
    told = problems(with_keys(scoring={"evaluate_over": ["answers_multi"], "select_on": "answers_multi"}))
    assert "answers_multi is reported only" in told
    assert "task.word_lists.answers has the name" in problems(with_keys(task={"word_lists": {"answers": "a.txt"}}))


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("train", "learning_rat", "train.learning_rate"),
        ("train", "lr", "train.learning_rate"),
        ("train", "zero_stage", "parallel.zero_stage"),
        ("run", "directroy", "run.directory"),
    ],
)
def test_unknown_key_is_told_the_nearest_valid_one(section: str, key: str, meant: str):
    message = problems(with_keys(**{section: {key: 1}}))
    assert f"unknown key `{section}.{key}`, did you mean `{meant}`?" in message


def test_unknown_section_is_told_the_nearest_valid_one():
    assert "unknown key `trian`, did you mean `train`?" in problems(with_keys(trian={"epochs": 1}))


def test_unknown_key_of_a_task_is_named_without_the_schemas_inner_levels():
    assert "unknown key `task.awnser`, did you mean `task.answer`?" in problems(with_keys(task={"awnser": "country"}))


def test_unknown_key_that_resembles_nothing_is_told_what_is_valid_there():
    message = problems(with_keys(run={"qqqq": 1}))
    assert "unknown key `run.qqqq` (valid here: directory, seeds)" in message


def test_all_problems_are_told_at_once():
    raw = with_keys(train={"lr": 1, "epochs": 0}, backbone={"dtype": "fp8"}, checkpoint={"keep": 1})
    message = problems(raw)
    assert "4 problems in the configuration" in message
    for key in ("train.lr", "train.epochs", "backbone.dtype", "checkpoint.keep"):
        assert f"`{key}`" in message


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "epochs", "many"),
        ("train", "learning_rate", [1e-5]),
        ("train", "global_batch", 0),
        ("train", "decay_per_epoch", 1.5),
        ("run", "seeds", []),
        ("parallel", "zero_stage", 5),
        ("prompt", "encoder", "gru"),
    ],
)
def test_wrong_value_is_named_with_its_key_and_what_was_found(section: str, key: str, value: Any):
    message = problems(with_keys(**{section: {key: value}}))
    assert "1 problem in the configuration" in message
    assert f"`{section}.{key}`: " in message
    assert f"found {value!r}" in message


def test_wrong_item_of_a_list_is_named_with_its_place():
    assert "`run.seeds.1`: " in problems(with_keys(run={"seeds": [0, "one"]}))


def test_missing_keys_are_named():
    message = problems({"task": {"type": "custom"}})
    for key in ("backbone", "task.test", "task.answer"):
        assert f"missing key `{key}`" in message


def test_unknown_task_type_is_told_the_known_ones():
    message = problems(with_keys(task={"type": "squad"}))
    assert "`task.type`: 'squad' is not one of" in message
    assert "'lama'" in message
    assert "'custom'" in message


def test_key_of_another_task_type_is_not_told_itself():
    raw = {"backbone": {"path": "b"}, "task": {"type": "lama", "root": "LAMA", "answer": "country"}}
    message = problems(raw)
    assert "unknown key `task.answer`" in message
    assert "did you mean `task.answer`" not in message


def test_seed_that_torch_cannot_take_is_refused():
    problems(with_keys(run={"seeds": [10**15]}))


def test_infinite_learning_rate_is_refused():
    problems(with_keys(train={"learning_rate": float("inf")}))


def test_missing_task_type_is_named():
    raw = with_keys()
    del raw["task"]["type"]
    assert "missing key `task.type`" in problems(raw)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"scoring": {"evaluate_over": ["word_list"], "select_on": "word_list"}}, "task.word_list names no file"),
        ({"scoring": {"evaluate_over": ["answers"]}}, "scoring.select_on is 'vocabulary'"),
        ({"task": {"train": None}}, "method ptuning needs task.train"),
        ({"prompt": {"manual": None}}, "method manual needs prompt.manual"),
        ({"run": {"seeds": [3, 3]}}, "run.seeds repeats an entry: [3, 3]"),
    ],
)
def test_keys_that_do_not_fit_together_are_refused(sections: dict[str, Any], told: str):
    assert told in problems(with_keys(**sections))


def test_methods_that_train_need_training_files_and_manual_ones_a_manual_prompt():
    raw = with_keys(task={"dev": None}, prompt={"manual": None}, methods=["manual+finetune"])
    assert "method manual+finetune needs task.dev" in problems(raw)
    assert "method manual+finetune needs prompt.manual" in problems(raw)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_are_for_a_tuned_lm(stage: int):
    assert "leave the LM frozen need 0 or 3" in problems(with_keys(parallel={"zero_stage": stage}))
    validate(with_keys(parallel={"zero_stage": stage}, methods=["ptuning", "finetune"]), "config.yaml")


def test_offload_is_for_frozen_weights():
    raw = with_keys(parallel={"zero_stage": 3, "offload": "cpu"}, methods=["finetune"])
    assert "parallel.offload: cpu is for frozen weights" in problems(raw)


def test_lm_has_a_learning_rate_of_its_own():
    """The released code's for LAMA."""
    assert validate(MINIMAL, "config.yaml").train.lm_learning_rate == 5e-6


def test_every_method_is_described():
    assert list(METHODS) == list(get_args(MethodName))


def test_manual_method_alone_needs_no_training_files():
    raw = with_keys(task={"train": None, "dev": None}, methods=["manual"])
    assert validate(raw, "config.yaml").methods == ["manual"]


# -- files -----------------------------------------------------------------------------------------------------------


def test_repeated_key_is_refused_with_its_line(write: Write):
    path = write("train:\n  epochs: 3\n  epochs: 4\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:3: not valid YAML: the key 'epochs' stands twice"):
        load_config(path)


def test_yaml_syntax_error_is_refused_with_its_line(write: Write):
    with pytest.raises(ConfigError, match=r"config\.yaml:2: not valid YAML"):
        load_config(write("train:\n  epochs: [1, 2\nrun: 3\n".replace("\nrun", "}\nrun")))


def test_exponent_without_a_point_is_a_number(write: Write):
    path = write(yaml.safe_dump(MINIMAL) + "train:\n  learning_rate: 1e-3\n")
    assert load_config(path).train.learning_rate == 1e-3


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration file .*nowhere\.yaml: No such file"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n"])
def test_top_level_must_be_keys_and_values(write: Write, text: str):
    with pytest.raises(ConfigError, match="expected keys and values at the top level"):
        load_config(write(text))


def test_file_that_is_not_utf8_is_refused(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_bytes("name: Málaga\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(path)


def test_key_that_is_a_list_is_refused(write: Write):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write("? [a, b]\n: 1\n"))


# -- layers ----------------------------------------------------------------------------------------------------------


def test_later_layers_and_the_file_itself_win_key_by_key(write: Write):
    write({"train": {"epochs": 1, "patience": 1, "global_batch": 16}}, "model.yaml")
    write({"train": {"patience": 2, "global_batch": 32}, "backbone": {"dtype": "bf16"}}, "site.yaml")
    path = write({**MINIMAL, "defaults": ["model.yaml", "site.yaml"], "train": {"global_batch": 64}})
    config = load_config(path)
    assert (config.train.epochs, config.train.patience, config.train.global_batch) == (1, 2, 64)
    assert config.backbone.dtype == "bf16"


def test_a_layer_may_have_layers(write: Write):
    write({"train": {"epochs": 7}}, "base.yaml")
    write({"defaults": ["base.yaml"], "train": {"patience": 3}}, "model.yaml")
    train = load_config(write({**MINIMAL, "defaults": ["model.yaml"]})).train
    assert (train.epochs, train.patience) == (7, 3)


def test_list_of_a_higher_layer_replaces_the_lower_one(write: Write):
    write({"run": {"seeds": [0, 1, 2]}}, "model.yaml")
    assert load_config(write({**MINIMAL, "defaults": ["model.yaml"], "run": {"seeds": [9]}})).run.seeds == [9]


def test_circular_defaults_are_refused_with_the_circle(write: Write):
    write({"defaults": ["config.yaml"]}, "model.yaml")
    with pytest.raises(ConfigError, match=r"goes in a circle: config\.yaml -> model\.yaml -> config\.yaml"):
        load_config(write({**MINIMAL, "defaults": ["model.yaml"]}))


def test_missing_layer_is_told_with_the_file_that_names_it(write: Write):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml \(named by `defaults:` in .*config\.yaml\)"):
        load_config(write({**MINIMAL, "defaults": ["nowhere.yaml"]}))


def test_defaults_must_be_a_list_of_files(write: Write):
    with pytest.raises(ConfigError, match=r"`defaults:` must be a list of files, found 'model\.yaml'"):
        load_config(write({**MINIMAL, "defaults": "model.yaml"}))


# -- overrides -------------------------------------------------------------------------------------------------------


def test_set_wins_over_every_file(write: Write):
    path = write(with_keys(train={"epochs": 3}))
    config = load_config(path, ["train.epochs=5", "train.learning_rate=1e-3", "run.seeds=[1, 2]"])
    assert (config.train.epochs, config.train.learning_rate, config.run.seeds) == (5, 1e-3, [1, 2])


def test_last_set_of_a_key_wins(write: Write):
    assert load_config(write(MINIMAL), ["train.epochs=5", "train.epochs=6"]).train.epochs == 6


@pytest.mark.parametrize("override", ["train.epochs", "=3", "train..epochs=3"])
def test_set_without_key_and_value_is_refused(write: Write, override: str):
    with pytest.raises(ConfigError, match=r"expected key=value, for example --set train\.epochs=3"):
        load_config(write(MINIMAL), [override])


def test_set_of_an_unknown_key_is_told_the_nearest_valid_one(write: Write):
    with pytest.raises(ConfigError, match=r"unknown key `train\.epoch`, did you mean `train\.epochs`\?"):
        load_config(write(MINIMAL), ["train.epoch=5"])


# -- paths -----------------------------------------------------------------------------------------------------------


def test_relative_input_path_is_relative_to_the_file_that_states_it(write: Write, tmp_path: Path):
    write({"backbone": {"path": "models/tiny"}}, "site/site.yaml")
    task = {"type": "custom", "train": "../a.jsonl", "dev": "b.jsonl", "test": "/data/c.jsonl", "answer": "country"}
    config = load_config(
        write({"defaults": ["../site/site.yaml"], "task": task, "methods": ["ptuning"]}, "mine/config.yaml")
    )
    assert config.backbone.path == str(tmp_path / "site" / "models" / "tiny")
    assert config.task.train == tmp_path / "a.jsonl"
    assert config.task.dev == tmp_path / "mine" / "b.jsonl"
    assert config.task.test == Path("/data/c.jsonl")


def test_relative_path_of_set_is_relative_to_the_working_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write(MINIMAL, "configs/config.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config(path, ["backbone.path=here"]).backbone.path == str(tmp_path / "here")


def test_run_directory_stays_relative_to_the_working_directory(write: Write):
    config = load_config(write(with_keys(run={"directory": "runs/mine"}), "configs/config.yaml"))
    assert config.run.directory == Path("runs/mine")


def test_environment_variable_and_home_are_expanded(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load_config(write(with_keys(backbone={"path": "${MODELS}/tiny"}, task={"test": "~/c.jsonl"})))
    assert config.backbone.path == str(tmp_path / "models" / "tiny")
    assert config.task.test == tmp_path / "home" / "c.jsonl"


@pytest.mark.parametrize("value", ["$NOT_SET_HERE/tiny", "${NOT_SET_HERE}/tiny"])
def test_unset_environment_variable_is_named(write: Write, monkeypatch: pytest.MonkeyPatch, value: str):
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    with pytest.raises(ConfigError, match=r"backbone\.path: .* uses the environment variable NOT_SET_HERE"):
        load_config(write(with_keys(backbone={"path": value})))


def test_name_of_the_embedded_backbone_is_no_path(write: Write):
    from megaptune.backbone.embedded import NAME, is_embedded

    path = write(with_keys(backbone={"path": NAME}))
    assert load_config(path, is_embedded=is_embedded).backbone.path == NAME


# -- saving ----------------------------------------------------------------------------------------------------------


def test_saved_configuration_loads_as_an_equal_one(write: Write):
    sections = {"train": {"learning_rate": 3e-4, "max_gradient_norm": 1.0}, "run": {"seeds": [1, 2]}}
    config = load_config(write(with_keys(**sections)))
    saved = write(config.model_dump(mode="json", exclude_none=True), "elsewhere/saved.yaml")
    assert load_config(saved) == config


def test_configuration_cannot_be_changed_after_loading():
    config = validate(MINIMAL, "config.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3


def test_identity_leaves_out_what_a_resumed_run_may_change():
    before = validate(MINIMAL, "config.yaml")
    layout = {"parallel": {"zero_stage": 3}, "monitor": {"log_every": 1}, "checkpoint": {"keep": 5}}
    after = validate(with_keys(run={"directory": "other"}, evaluation={"batch": 1}, **layout), "config.yaml")
    assert before.identity() == after.identity()


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("run", "seeds", [1]),
        ("train", "learning_rate", 1e-4),
        ("train", "micro_batch", 2),
        ("prompt", "template", "[P] {city} [answer]"),
        ("task", "limit_train", 3),
        ("backbone", "dtype", "bf16"),
        ("evaluation", "every_epochs", 2),
    ],
)
def test_identity_holds_what_decides_the_result(section: str, key: str, value: Any):
    changed: Config = validate(with_keys(**{section: {key: value}}), "config.yaml")
    assert changed.identity() != validate(MINIMAL, "config.yaml").identity()
