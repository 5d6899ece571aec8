"""No circles among the files of the package.

Imports inside functions and under ``TYPE_CHECKING`` count: a reader meets them all the same.
"""

import ast
from pathlib import Path

SRC = Path(__file__).resolve().parent.parent / "src" / "landmark"

# Circles that are still there, each as its sorted files. A circle that is gone leaves this list.
KNOWN: set[tuple[str, ...]] = set()


def module_name(path):
    """``landmark.hf.cache`` for its file, ``landmark.hf`` for the ``__init__.py`` of the folder."""
    parts = path.relative_to(SRC.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def files_of_the_package():
    """Path by module; the stubs of the bundled models belong to transformers' folders."""
    paths = sorted(path for path in SRC.rglob("*.py") if "bundled" not in path.parts)
    return {module_name(path): path for path in paths}


def imported_modules(source, modules):
    """The modules of the package that a file's text imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return found & set(modules)


def import_graph():
    """The modules that each module imports.

    ``landmark`` itself imports nothing here: its public names are a table that is read lazily.
    """
    files = files_of_the_package()
    graph = {
        module: imported_modules(path.read_text(encoding="utf-8"), files)
        for module, path in files.items()
    }
    graph["landmark"] = set()
    return graph


def reachable(graph, start):
    """All modules that a module imports, directly or through others."""
    found = set()
    waiting = [start]
    while waiting:
        for module in graph[waiting.pop()]:
            if module not in found:
                found.add(module)
                waiting.append(module)
    return found


def circles(graph):
    """The groups of modules that all import each other, directly or through others."""
    reached = {module: reachable(graph, module) for module in graph}
    return {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }


def test_no_file_imports_itself_through_others():
    found = circles(import_graph())
    new = sorted(found - KNOWN)
    gone = sorted(KNOWN - found)
    assert not new, "circles of imports: " + "; ".join(" <-> ".join(circle) for circle in new)
    assert not gone, f"no circle any more, so take it out of KNOWN: {gone}"


def test_versions_imports_nothing_of_the_package():
    assert import_graph()["landmark.versions"] == set()


def test_a_circle_is_found_wherever_its_imports_stand():
    modules = {"landmark.a", "landmark.b", "landmark.c", "landmark.d"}
    sources = {
        "landmark.a": "from landmark import b",
        "landmark.b": "def later():\n    import landmark.c",
        "landmark.c": "if TYPE_CHECKING:\n    from landmark.a import Name",
        "landmark.d": "from landmark.a import Name",
    }
    graph = {name: imported_modules(source, modules) for name, source in sources.items()}
    assert circles(graph) == {("landmark.a", "landmark.b", "landmark.c")}
