"""What is told of jobs that a run goes on with."""

from types import SimpleNamespace

from megaptune.training_state import resumed


def test_jobs_that_stand_at_the_same_step_share_a_line():
    jobs = [("P17/ptuning", 32, 96), ("P413/ptuning", 32, 48), ("P30/ptuning", 32, 96), ("P19/ptuning", 16, 96)]
    trainings = [SimpleNamespace(name=name, step=step, total_steps=total) for name, step, total in jobs]
    assert resumed(trainings) == [
        "2 jobs (P17/ptuning to P30/ptuning)  resumed at step 32 of 96",
        "P413/ptuning  resumed at step 32 of 48",
        "P19/ptuning  resumed at step 16 of 96",
    ]
    assert resumed([]) == []
