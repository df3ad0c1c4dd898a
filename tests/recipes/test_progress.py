"""A bar in a terminal, a few lines in a log, and one process that speaks."""

import io
from types import SimpleNamespace

import pytest
from makers import distiller
from transformers import PrinterCallback, ProgressCallback, TrainerState

from hf_semckd.recipes.progress import LINES, ProgressBar, ProgressLines, Voice, duration, use_progress


def test_a_voice_prints_a_topic_and_its_lines(capsys):
    Voice()("data", "first\nsecond")
    Voice(speaks=False)("data", "nothing")
    Voice(speaks=False).text("nothing")
    assert capsys.readouterr().out == "data      first\n          second\n"
    stream = io.StringIO()
    Voice(stream=stream)("data", "")
    assert stream.getvalue() == "data      \n" and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (83, "1 min 23 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (3900, "1 h 05 min"),
        (86_369, "23 h 59 min"),
        (86_371, "1 d 0 h"),
        (4 * 86_400 + 6 * 3600, "4 d 6 h"),
        (99 * 86_400 + 86_399, "100 d 0 h"),
    ],
)
def test_times_have_their_two_largest_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("steps", "expected"), [(3, 3), (20, 20), (1000, LINES + 1)])
def test_a_log_gets_few_lines_however_often_is_logged(steps, expected):
    stream = io.StringIO()
    lines, state = ProgressLines("training", Voice(stream=stream)), TrainerState(max_steps=steps)
    lines.on_train_begin(None, state, None)
    for step in range(1, steps + 1):
        state.global_step = step
        lines.on_log(None, state, None, logs={"loss": 0.5, "learning_rate": 1.0})
        lines.on_log(None, state, None, logs={"train_runtime": 1.0})
    shown = stream.getvalue().splitlines()
    assert len(shown) == pytest.approx(expected, abs=1) and len(shown) <= LINES + 1
    assert all("loss 0.5" in line and "learning_rate" not in line for line in shown)
    assert shown[-1].startswith(f"training  step {steps}/{steps}")


def test_evaluations_are_always_told():
    stream = io.StringIO()
    lines, state = ProgressLines("training", Voice(stream=stream)), TrainerState(max_steps=1000)
    for step in (1, 2, 3):
        state.global_step = step
        lines.on_log(None, state, None, logs={"eval_loss": 1.0, "eval_accuracy": 0.25})
    assert stream.getvalue().count("eval loss 1  eval accuracy 0.25") == 3


@pytest.mark.parametrize(
    ("speaks", "bars", "kind"), [(True, True, ProgressBar), (True, False, ProgressLines), (False, True, None)]
)
def test_trainers_own_progress_makes_room(tmp_path, speaks, bars, kind):
    trainer = distiller(tmp_path, {"disable_tqdm": not bars})
    use_progress(trainer, "training", Voice(speaks=speaks, stream=io.StringIO()))
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert not {PrinterCallback, ProgressCallback} & {*kinds}
    assert (ProgressBar in kinds, ProgressLines in kinds) == (kind is ProgressBar, kind is ProgressLines)


def test_a_bar_has_the_name_and_the_loss(capsys):
    bar, state = ProgressBar("teacher"), TrainerState(max_steps=2, is_world_process_zero=True)
    args = SimpleNamespace()
    bar.on_train_begin(args, state, None)
    bar.on_log(args, state, None, logs={"loss": 1.5})
    bar.on_log(args, state, None, logs={"eval_loss": 2.5})
    bar.on_train_end(args, state, None)
    bar.on_log(args, state, None, logs={"loss": 3.5})
    shown = capsys.readouterr().err
    assert "teacher" in shown and "loss=1.500" in shown and "{" not in shown
