"""Marks tables of many columns, which the style sheet keeps on one line a row."""

from docutils import nodes
from sphinx.application import Sphinx

COLUMNS = 7


def mark(_app: Sphinx, doctree: nodes.document) -> None:
    """Give the class `wide` to every table of at least `COLUMNS` columns."""
    for table in doctree.findall(nodes.tgroup):
        if table["cols"] >= COLUMNS and isinstance(table.parent, nodes.table):
            table.parent["classes"].append("wide")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the reading of pages."""
    app.connect("doctree-read", mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
