"""How `make docs` builds these pages.

Sphinx with MyST was chosen over MkDocs in November 2026: Sphinx, MyST and Furo have regular
releases, whereas MkDocs 1.x has had none since August 2024 and Material for MkDocs reaches its
end of life in May 2027. The pages are Markdown, so that a later move stays cheap. Nothing is
fetched while building or reading: no intersphinx, web fonts or CDN.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]

from hf_semckd.version import __version__  # noqa: E402

project = "hf-semckd"
author = "the hf-semckd authors"
copyright = "the hf-semckd authors, Apache-2.0"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "command_help",
    "config_fields",
    "docstrings",
    "mathml",
    "wide_tables",
]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
add_module_names = False
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
# Several names may share a description.
napoleon_use_param = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "hf-semckd"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#1f5f8b",
        "color-brand-content": "#1f5f8b",
    },
    "dark_css_variables": {
        "color-brand-primary": "#7cb8e0",
        "color-brand-content": "#7cb8e0",
    },
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
