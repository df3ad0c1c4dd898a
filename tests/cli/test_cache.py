"""`hf-semckd cache`: fills what a training then needs, and says what is wrong with what it is given."""

import re
import runpy
import sys

import pytest
from datasets import Dataset
from makers import images, vit

from hf_semckd import SemCKDConfig, SemCKDTrainer
from hf_semckd.cli import main
from hf_semckd.cli.data import load_split


@pytest.fixture
def parts(tmp_path):
    vit().save_pretrained(tmp_path / "student")
    vit(3, 24, seed=9).save_pretrained(tmp_path / "teacher")
    rows = [
        {key: value if key == "labels" else value.tolist() for key, value in row.items()} for row in images(9).rows
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    names = {"teacher": "teacher", "student": "student", "dataset": "data", "teacher_cache_dir": "cache"}
    words = [word for name, folder in names.items() for word in (f"--{name}", str(tmp_path / folder))]
    return [*words, "--use_cpu", "True", "--per_device_eval_batch_size", "4", "--disable_tqdm", "True"]


def test_training_after_the_command_never_runs_the_teacher(parts, tmp_path, capsys):
    assert main(["cache", *parts]) == 0
    out = capsys.readouterr().out
    assert "9 samples are cached" in out and f"teacher_cache_dir={str(tmp_path / 'cache')!r}" in out
    assert re.search(r"cache holds [1-9][\d.]* KB\.", out)
    teacher = vit(3, 24, seed=9)
    calls = []
    args = SemCKDConfig(
        str(tmp_path / "out"),
        use_cpu=True,
        report_to="none",
        max_steps=3,
        per_device_train_batch_size=3,
        save_strategy="no",
        teacher_cache_dir=str(tmp_path / "cache"),
    )
    data = load_split(str(tmp_path / "data"), "train")
    trainer = SemCKDTrainer(vit(), args, teacher_model=teacher, train_dataset=data)
    handle = teacher.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    handle.remove()
    assert not calls and trainer.state.global_step == 3


def test_it_runs_as_a_module(parts, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hf-semckd", "cache", *parts])
    monkeypatch.delitem(sys.modules, "hf_semckd.__main__", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("hf_semckd", run_name="__main__")
    assert ended.value.code == 0
    assert "9 samples are cached" in capsys.readouterr().out


def test_the_help_of_the_command_lists_its_options_and_those_of_the_training(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["cache", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and out.startswith("usage: hf-semckd cache --teacher MODEL")
    for option in ("--teacher", "--student", "--dataset", "--split", "--teacher_cache_dtype", "--max_tokens"):
        assert f"\n  {option} " in out


def test_what_cannot_work_is_one_message_and_no_traceback(parts, tmp_path, capsys):
    words = parts.copy()
    words[words.index(str(tmp_path / "data"))] = str(tmp_path / "nowhere")
    assert main(["cache", *words]) == 2
    assert "save_to_disk" in capsys.readouterr().err
    without = [word for word in parts if word not in ("--teacher_cache_dir", str(tmp_path / "cache"))]
    assert main(["cache", *without]) == 2
    assert "set teacher_cache_dir" in capsys.readouterr().err


def test_an_unknown_option_is_told(parts, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["cache", *parts, "--bogus", "1"])
    assert ended.value.code == 2 and "--bogus" in capsys.readouterr().err
