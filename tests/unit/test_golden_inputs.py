"""What the backbone reads, for every SuperGLUE task, pattern and family, against the readable files in tests/golden."""

import golden
import pytest

from megaptune.patterns import load_patterns

COMMAND = "python tests/helpers/golden.py"


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return golden.render_all()


@pytest.mark.parametrize("task", golden.TASKS)
def test_inputs_are_those_of_the_golden_file(task: str, rendered: dict[str, str]):
    pinned = (golden.FOLDER / f"{task}.txt").read_text(encoding="utf-8")
    assert rendered[f"{task}.txt"].splitlines() == pinned.splitlines(), f"if this is meant: {COMMAND}, and look at it"


def test_no_golden_file_is_left_over(rendered: dict[str, str]):
    assert {path.name for path in golden.FOLDER.glob("*.txt")} == set(rendered)


def test_every_task_has_patterns_for_both_families_and_several_manual_ones():
    for task, patterns in load_patterns(golden.ROOT / "configs" / "patterns" / "all.yaml").items():
        for kind in ("causal", "masked"):
            fitting = [pattern for pattern in patterns.manual.values() if kind in pattern.families]
            assert len(fitting) >= 2, (task, kind)
            assert "[P" in patterns.pick("ptuning", kind).text, (task, kind)
        assert not [pattern.text for pattern in patterns.manual.values() if "[P" in pattern.text], task
        assert all("[P" in pattern.text for pattern in patterns.ptuning.values()), task
