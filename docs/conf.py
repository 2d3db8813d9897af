"""How `make docs` makes HTML of docs/, README.md and the figures of benchmarks/.

The root is that of the repository, so a link between any two of them is followed, its anchor too,
and one that leads nowhere ends the build (`-W`). A link to another file carries the file along.
Nothing is loaded from elsewhere: what is built opens without a network.

    make docs
"""

from caravan import __version__

project = "Caravan"
author = "the Caravan authors"
release = version = __version__
root_doc = "docs/index"
include_patterns = ["README.md", "docs/**", "reproduce/README.md", "benchmarks/results/**"]
exclude_patterns = ["docs/_build", ".*", "runs", "tests", "src", "conf", "multirun", "outputs"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4

# Signatures and docstrings are all that is read of the code: what is heavy need not load.
autodoc_mock_imports = ["torch", "transformers", "faiss", "peft", "safetensors", "tokenizers"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_inherit_docstrings = False

html_theme = "furo"
html_title = "Caravan"
html_show_sphinx = False
html_copy_source = False
highlight_language = "none"
