"""`hf-semckd` alone: what it can do, and what it says of a word it does not know."""

import subprocess
import sys

import pytest

from hf_semckd.cli import COMMANDS, main


def test_without_words_it_explains_itself(capsys):
    assert main([]) == 0 == main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("word", "meant"), [("cahce", "cache"), ("make_student", "make-student"), ("eval", "evaluate")]
)
def test_an_unknown_command_is_refused_with_the_near_one(word, meant, capsys):
    assert main([word]) == 2
    assert f"unknown command '{word}'; did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and f"usage: hf-semckd {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"distill", "cache", "plan"}))
def test_what_each_process_would_do_again_is_refused_in_several(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    # That of a cluster's machines says nothing of this command's processes.
    assert "runs in one process" not in refusal(command, capsys)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert f"hf-semckd {command} runs in one process" in refusal(command, capsys)


def refusal(command, capsys):
    try:
        assert main([command, "--no-such-option"]) == 2
    except SystemExit as ended:
        assert ended.code == 2
    return capsys.readouterr().err


def test_the_help_needs_no_model_library():
    script = "import sys; from hf_semckd.cli import main; main([]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
