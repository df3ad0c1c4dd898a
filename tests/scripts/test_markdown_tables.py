import math

import numpy as np
import pytest
from markdown_tables import format_markdown_table

from hf_semckd.errors import InputError

ROWS = [
    {"name": "teacher", "parameters": 86_567_656, "metric": 0.96875, "seconds": None},
    {"name": "student, SemCKD", "parameters": np.int64(5_526_346), "metric": np.float32(0.5), "seconds": 1234.56},
]


def test_numbers_have_the_digits_that_matter_and_are_aligned_right():
    expected = """\
| name | parameters | metric | seconds |
|---|---:|---:|---:|
| teacher | 86,567,656 | 0.9688 | - |
| student, SemCKD | 5,526,346 | 0.5000 | 1,234.6 |"""
    assert format_markdown_table(ROWS, ["name", "parameters", "metric", "seconds"]) == expected


def test_pipes_and_line_breaks_do_not_end_a_cell():
    rows = [{"name": "a|b", "ok": True, "value": 1e-5}, {"name": "two\nlines", "value": math.nan}]
    expected = """\
| name | ok | value |
|---|---|---:|
| a\\|b | True | 1.00e-05 |
| two lines | - | nan |"""
    assert format_markdown_table(rows, ["name", "ok", "value"]) == expected


def test_a_table_without_rows_keeps_its_headings():
    assert format_markdown_table([], ["name"]) == "| name |\n|---|"


def test_columns_that_nothing_fills_are_refused():
    with pytest.raises(InputError, match="received: metrics\n.*name, parameters"):
        format_markdown_table([{"name": "a", "parameters": 1}], ["name", "metrics"])
    with pytest.raises(InputError, match="at least one"):
        format_markdown_table([{"name": "a"}], [])
