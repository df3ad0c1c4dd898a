"""The pictures of the documentation show what was printed, and nothing of the machine."""

import importlib
import sys

import pytest

pytest.importorskip("markdown_it", reason="needs the documentation tools: pip install -e '.[docs]'")


@pytest.fixture(scope="module")
def screenshots():
    return importlib.import_module("screenshots")


def test_long_progress_is_shortened_and_every_training_keeps_its_ends(screenshots):
    teacher = [f"teacher   step {n}/9  loss 1" for n in range(9)]
    training = [f"training  step {n}/3  loss 1" for n in range(3)]
    shown = list(screenshots.fewer_steps(["data", *teacher, "teacher   a name", *training, "", "model  run by"]))
    assert shown[:7] == ["data", *teacher[:3], "teacher   ...", *teacher[-2:]]
    assert shown[7:] == ["teacher   a name", *training, "", "model  run by"]


def test_a_terminal_shows_text_as_text_and_no_folder_of_the_machine(screenshots, tmp_path):
    said = f"<b>bold</b> & {tmp_path}/student\nreport    {tmp_path.as_uri()}/report.html"
    page = screenshots.terminal_page("hf-semckd report <out>", said, tmp_path)
    assert str(tmp_path) not in page
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; ~/student" in page and "file://~/report.html" in page
    assert "$ hf-semckd report &lt;out&gt;" in page


def test_a_card_is_shown_without_what_is_for_search(screenshots, tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\n---\n\n# student\n\n| a |\n|---|\n| 1 |\n\n<script>x</script>\n"
    )
    page = screenshots.card_page(tmp_path)
    assert "license" not in page and "<h1>student</h1>" in page and "<td>1</td>" in page and "<script>" not in page


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_commands_print_to_a_terminal(screenshots, tmp_path):
    code = "import sys; print(sys.stdout.isatty()); print('last')"
    assert screenshots.printed([sys.executable, "-c", code], tmp_path, {}) == "True\nlast\n"


def test_a_command_that_fails_ends_the_run(screenshots, tmp_path):
    with pytest.raises(SystemExit, match="status 3"):
        screenshots.printed([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, {})
