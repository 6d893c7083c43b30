"""Data flows down the house: a module imports only from those above it in LAYERS.

A new module is written in at the place where it belongs. Imports inside functions count like any other.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megaptune"

LAYERS = """
__init__
errors
config_files            patterns  methods  config_base  fact_config  hosting_config
superglue_config        config  schedule
run                     run.files  run.roll_call  run.topology  run.grid  run.exact_sum  run.stopping  run.monitor
backbone                backbone.weight_files  backbone.architectures  backbone.checkpoint_reader
backbone.description
backbone.convert        backbone.convert.torch_file  backbone.convert.output  backbone.convert.conversion
backbone.convert.parts  backbone.convert.bpe  backbone.convert.fairseq_dictionary  backbone.convert.fairseq_megatron
backbone.convert.gguf   backbone.convert.megatron_lm  backbone.convert.command
backbone.embedded       backbone.zero_config
run.preflight
kernels                 backbone.frozen_linear  backbone.fingerprint  backbone.tensor_parallel
backbone.random_weights  backbone.loading  backbone.whole_model  backbone.output_rows    backbone.nvme  backbone.weights
backbone.deep_prompts   backbone.inputs         backbone.packed_attention  backbone.compiled
backbone.context_files  backbone.context_cache
backbone.engine         backbone.host
backbone.weight_pieces  backbone.tuned_weights  backbone.tuned_host
run.checkpoint          run.directory
tasks                   tasks.records  tasks.lama  tasks.custom  tasks.text_forms
tasks.superglue         tasks.superglue.records  tasks.superglue.spans  tasks.superglue.antecedents
tasks.superglue.readers  tasks.superglue.loading  tasks.superglue.metrics  tasks.superglue.submission
prompts                 prompts.tokens  prompts.shortening  prompts.template  prompts.verbalizer
prompts.label_words     prompts.encoder  prompts.grouped  prompts.encoder_stack  prompts.bank
baselines               pattern_examples        option_examples  classifier_examples
examples                superglue_data  superglue_examples  batches  scoring  option_scoring  evaluation
long_answers
jobs                    training_report  training_state
trainer                 option_models  preparation      soft_labels  pet
planning                planning.layout  planning.activations  planning.workload  planning.memory
planning.communication  planning.choice  planning.settle  planning.source
planning.report         planning.dry_run  planning.session
results                 results.facts_job  results.prompt_folder  results.lm_folder  results.table
results.superglue_job   results.superglue_table  results.tables
experiment              session
report                  report.labels  report.runs  report.scores  report.paper  report.blocks  report.provenance
report.plots            report.facts  report.superglue  report.variance  report.learning  report.long_form
report.document         report.command
pretraining             pretraining.config  pretraining.corpus  pretraining.vocabulary  pretraining.models
pretraining.training    pretraining.command
cli                     train  __main__
"""
ORDER = LAYERS.split()


def module_name(file: Path) -> str:
    """``megaptune/run/files.py`` -> ``run.files``; a package is its ``__init__.py``."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1]) if parts[-1] == "__init__" and len(parts) > 1 else ".".join(parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports(file: Path) -> set[str]:
    """The modules of megaptune that a file imports, anywhere in it, as names of the list."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides what it imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {_owner(name.removeprefix("megaptune").lstrip(".")) for name in names if name.startswith("megaptune")}
    return found


def _owner(name: str) -> str:
    """The module that ``name`` is, or is defined in."""
    if name.split(".")[0] == "kernels":
        return "kernels"
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or "__init__"


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted([*MODULES, "kernels"])


@pytest.mark.parametrize("name", [name for name in ORDER if name != "kernels"])
def test_module_imports_only_from_above(name: str):
    above = ORDER[: ORDER.index(name)]
    upward = sorted(imports(MODULES[name]) - set(above))
    assert not upward, f"megaptune.{name} imports {upward}, which stand below it or not at all in ORDER"


def test_the_check_sees_imports_of_every_form(tmp_path: Path):
    file = tmp_path / "a.py"
    file.write_text(
        "import megaptune.errors\nfrom megaptune import __version__\nfrom megaptune.run import topology as ranks\n"
        "def work():\n    from megaptune.kernels import dispatch\n    from megaptune.config import Config\n"
    )
    assert imports(file) == {"errors", "__init__", "run.topology", "kernels", "config"}


def test_kernels_know_nothing_of_the_program():
    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not [name for name in names if name.split(".")[0] == "megaptune"], file.name


def test_only_the_dispatch_of_the_kernels_is_used():
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megaptune.kernels"):
                assert (node.module, [alias.name for alias in node.names]) == ("megaptune.kernels", ["dispatch"]), name


def test_one_file_names_deepspeeds_configuration_keys():
    keys = ("zero_optimization", "train_micro_batch_size_per_gpu", "gradient_clipping")
    naming = {name for name, file in MODULES.items() if any(key in file.read_text(encoding="utf-8") for key in keys)}
    assert naming == {"backbone.zero_config"}
