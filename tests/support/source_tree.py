"""The project's modules and what each of them imports, read off the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

PACKAGES = ("policies", "cost_model", "flexmoe")
WITH_SCRIPTS = (*PACKAGES, "scripts")


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name, wherever in a module it is imported.

    Args:
        module: dotted name of the importing module.
        line: of the statement.
        target: dotted name of the imported module.
        name: what is taken from it; None where the module itself is imported.
        alias: the local name.
        for_types: it is under `TYPE_CHECKING`.
    """

    module: str
    line: int
    target: str
    name: str | None
    alias: str
    for_types: bool

    @property
    def top(self) -> str:
        """The imported top-level package."""
        return self.target.split(".")[0]

    def __str__(self) -> str:
        name = f"{self.target}.{self.name}" if self.name else self.target
        return f"{self.module}:{self.line} imports {name}"


@cache
def paths(*packages: str) -> tuple[Path, ...]:
    """The Python files of packages, or of folders given with slashes."""
    return tuple(sorted(path for package in packages for path in (ROOT / package).rglob("*.py")))


def modules(*packages: str) -> list[str]:
    """Dotted names; that of an `__init__` is its folder's."""
    return [_module_of(path) for path in paths(*packages)]


@cache
def path_of(module: str) -> Path:
    """The file of a module of the project."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def is_module(name: str) -> bool:
    """Whether the project has a module of that dotted name."""
    return name.split(".")[0] in (*WITH_SCRIPTS, "tests") and path_of(name).exists()


def folders(*packages: str) -> list[Path]:
    """Folders that hold Python files, relative to the project."""
    return sorted({path.parent.relative_to(ROOT) for path in paths(*packages)})


@dataclass(frozen=True, slots=True)
class Source:
    """What the rules ask of a module, found in one walk. The tree itself is not kept: those of all modules are large.

    Args:
        imports: all of them, those within functions and under `TYPE_CHECKING` too.
        asserts: lines.
        prints: lines that call `print`.
        private: lines that use an attribute with a private name, with the text before the dot and the name.
        texts: lines and values of the texts that the module makes, also within f-strings, but not of its docstrings.
        documented_only: it holds a docstring at most.
    """

    imports: tuple[Import, ...]
    asserts: tuple[int, ...]
    prints: tuple[int, ...]
    private: tuple[tuple[int, str, str], ...]
    texts: tuple[tuple[int, str], ...]
    documented_only: bool


@cache
def source(module: str) -> Source:
    """Of a module of the project."""
    tree = ast.parse(path_of(module).read_text("utf-8"))
    nodes = list(ast.walk(tree))
    typed = {id(inner) for node in nodes if isinstance(node, ast.If) and _for_types(node) for inner in node.body}
    alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    imports, asserts, prints, private, texts = [], [], [], [], []
    for node in nodes:
        match node:
            case ast.Import() | ast.ImportFrom():
                found = _imported(module, node)
                imports += [Import(module, node.lineno, *what, for_types=id(node) in typed) for what in found]
            case ast.Assert():
                asserts.append(node.lineno)
            case ast.Call(func=ast.Name(id="print")):
                prints.append(node.lineno)
            case ast.Attribute(attr=name) if _is_private(name):
                private.append((node.lineno, ast.unparse(node.value), name))
            case ast.Constant(value=str(text)) if id(node) not in alone:
                texts.append((node.lineno, text))
    lists = (tuple(found) for found in (imports, asserts, prints, private, texts))
    return Source(*lists, documented_only=len(tree.body) <= (ast.get_docstring(tree) is not None))


def _for_types(node: ast.If) -> bool:
    return any(
        "TYPE_CHECKING" in (getattr(part, "id", None), getattr(part, "attr", None)) for part in ast.walk(node.test)
    )


def imports(module: str) -> tuple[Import, ...]:
    """All imports of a module: those within functions and under `TYPE_CHECKING` too."""
    return source(module).imports


def _imported(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str | None, str]]:
    """Module, name taken from it and local name of everything that a statement imports."""
    source = None if isinstance(node, ast.Import) else _absolute(module, node)
    for alias in node.names:
        local, inner = alias.asname or alias.name, f"{source}.{alias.name}"
        if source is None:
            yield alias.name, None, local
        elif is_module(inner):
            yield inner, None, local
        else:
            yield source, alias.name, local


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module
    parts = module.split(".")
    inside = parts if path_of(module).name == "__init__.py" else parts[:-1]
    return ".".join((*inside[: len(inside) - node.level + 1], *filter(None, [node.module])))


def all_imports(*packages: str) -> Iterator[Import]:
    """The imports of all modules of packages."""
    return (i for module in modules(*packages) for i in imports(module))


def private_names(module: str) -> Iterator[str]:
    """Uses of a private name of another module of the project, as text: imported, or as an attribute of the module."""
    own = imports(module)
    for i in own:
        if is_module(i.target) and any(map(_is_private, (i.name or "", *i.target.split(".")))):
            yield str(i)
    imported = {i.alias for i in own if i.name is None and is_module(i.target)}
    for line, owner, name in source(module).private:
        if owner in imported:
            yield f"{module}:{line} uses {owner}.{name}"


def cycle(edges: Iterable[tuple[str, str]]) -> list[str]:
    """The nodes of one cycle of a graph in order, the first one again at the end; empty when there is none."""
    graph: dict[str, set[str]] = {}
    for start, end in edges:
        graph.setdefault(start, set()).add(end)
    done: set[str] = set()
    for node in sorted(graph):
        if found := _cycle_from(node, graph, done, []):
            return found
    return []


def _cycle_from(node: str, graph: dict[str, set[str]], done: set[str], path: list[str]) -> list[str]:
    if node in path:
        return [*path[path.index(node) :], node]
    if node in done:
        return []
    for following in sorted(graph.get(node, ())):
        if found := _cycle_from(following, graph, done, [*path, node]):
            return found
    done.add(node)
    return []


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
