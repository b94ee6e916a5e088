"""The integrations import only existing names of this package; needs none of their libraries."""

import ast
from importlib import import_module

import pytest

from stack.servers import ROOT

FILES = sorted((ROOT / "exporter" / "integrations").glob("*.py"))
INTEGRATIONS = [path for path in FILES if "from exporter" in path.read_text()]


@pytest.mark.parametrize("path", INTEGRATIONS, ids=lambda path: path.stem)
def test_every_name_that_an_integration_imports_from_this_package_exists(path):
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    own = [node for node in imports if node.module.split(".")[0] == "exporter"]
    assert own
    for node in own:
        module = import_module(node.module)
        assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], node.module
