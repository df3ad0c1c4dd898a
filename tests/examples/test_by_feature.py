"""Every small example runs as it is written; only models and data of the Hub are replaced by tiny ones."""

import pytest
from doc_pages import ROOT
from stand_ins import with_stand_ins

SCRIPTS = sorted((ROOT / "examples" / "by_feature").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs_and_writes_a_student(path, tmp_path, monkeypatch):
    if path.stem == "quantized_teacher":
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    code = with_stand_ins(path.read_text(encoding="utf-8"), tmp_path)
    exec(compile(code, str(path), "exec"), {"__name__": "__main__"})
    written = {file.name for file in (tmp_path / "outputs" / path.stem).iterdir()}
    assert written & {"model.safetensors", "adapter_model.safetensors"}


def test_they_are_small():
    assert SCRIPTS and all(len(path.read_text(encoding="utf-8").splitlines()) <= 60 for path in SCRIPTS)
