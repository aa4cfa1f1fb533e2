"""The Trainer beside an accelerator made of CPU memory: steps do not wait for it, and logs read it little."""

import pytest

RUNS = ["at once, shared pictures", "accumulated, each alone"]


def waits(facts):
    return facts["fetchs"] + facts["reads"] + facts["waits"]


@pytest.mark.parametrize("run", RUNS)
def test_a_step_waits_for_nothing(on_accelerator, run):
    told = on_accelerator["trainer"]
    two, four = (told[f"{run}, {steps} steps, a log each 100"] for steps in (2, 4))
    assert four["launchs"] > two["launchs"]
    assert four["sends"] > two["sends"]
    assert waits(four) == waits(two)
    assert four["blocking"] == two["blocking"]


@pytest.mark.parametrize("run", RUNS)
def test_a_log_reads_little(on_accelerator, run):
    told = on_accelerator["trainer"]
    each, none = (told[f"{run}, 4 steps, a log each {logging}"] for logging in (1, 100))
    # Of four logs: the loss, the norm of the gradients, scale, bias, mean cosines, groups of shared pictures.
    assert 0 < waits(each) - waits(none) <= 4 * 7


@pytest.mark.parametrize("run", RUNS)
def test_weights_and_logs_are_those_of_the_cpu(on_accelerator, run):
    told = on_accelerator["trainer"][run]
    assert told["apart"] < 1e-5
    assert len(told["logs_apart"]) == 4
    assert max(told["logs_apart"]) < 1e-4
