"""How Sphinx builds the documentation: `make docs`."""

import zmqsched

project = "zmqsched"
release = version = zmqsched.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"zmqsched {release}"
myst_heading_anchors = 3

# The docstrings are NumPy's kind; the types are in the signatures.
napoleon_google_docstring = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 100
