"""How Sphinx builds the docs: ``nox -s docs``, without the network unless TRIO_WORKERS_DOCS_ONLINE=1."""

import builtins
import os
import re
import sys
import tomllib
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parent.parent
# What is documented is what stands beside the docs, installed or not.
sys.path.insert(0, str(ROOT))

project = "trio_workers"
author = "the trio_workers authors"
copyright = "2026, the trio_workers authors"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "examples/*"]
nitpicky = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3
copybutton_prompt_text = "$ "

html_theme = "furo"
html_static_path = ["_static"]  # the charts of the benchmarks, where a forge finds them too
html_title = f"trio_workers {release}"

if os.environ.get("TRIO_WORKERS_DOCS_ONLINE") == "1":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "trio": ("https://trio.readthedocs.io/en/stable", None),
    }

# Names of others can't be looked up offline; a name of ours that leads nowhere is still an error.
_modules = "|".join(
    sorted(map(re.escape, {*sys.stdlib_module_names, "attr", "attrs", "opentelemetry", "prometheus_client", "trio"}))
)
_builtins = "|".join(sorted(map(re.escape, dir(builtins))))
nitpick_ignore_regex = [
    (r"py:.*", rf"({_modules})(\..+)?"),
    (r"py:.*", rf"({_builtins})"),
    # Unions and names for checkers alone, which autodoc shows by their name and nobody needs to look up.
    (r"py:.*", r"AbstractAsyncContextManager|Answer|Buffer|Starlette|trio_workers\._conversation\.(Conversation|Talk)"),
    # Type variables: one capital letter.
    (r"py:.*", r"trio_workers\.(\w+\.)*_?[A-Z]"),
]


def resolve_public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.reference | None:
    """Lead an annotation's ``trio_workers._module.Name`` to the public ``trio_workers.Name`` that is documented."""
    private = re.fullmatch(r"trio_workers\._\w+\.(.+)", node.get("reftarget", ""))
    if node.get("refdomain") != "py" or private is None:
        return None
    public = f"trio_workers.{private[1]}"
    domain = env.get_domain("py")
    for kind in (node["reftype"], "obj"):
        found = domain.resolve_xref(env, node["refdoc"], app.builder, kind, public, node, contnode)
        if found is not None:
            return found
    return None


def setup(app: Sphinx) -> None:
    app.connect("missing-reference", resolve_public_name)
