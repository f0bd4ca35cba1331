"""Every field of the configuration is read, of the very dataclass that has it."""

import ast
import dataclasses
from collections import defaultdict
from functools import cache

import pytest
from paths import ROOT

from kd_jax.config import Config, record

PARTS = [Config, *filter(None, (record.part_of(e.type) for e in dataclasses.fields(Config)))]
FIELDS = [f"{part.__name__}.{entry.name}" for part in PARTS for entry in dataclasses.fields(part)]
SOURCES = {file: file.read_text() for file in sorted((ROOT / "kd_jax").rglob("*.py"))}
READERS = [text for file, text in SOURCES.items() if file.parent.name != "config"]

parse = cache(ast.parse)


class Reader(ast.NodeVisitor):
    """Collects `Class.field` of each attribute that is read, by the annotations of all sources.

    A name has the classes of its annotation or of what is assigned to it in the same function.
    """

    def __init__(self, sources: list[str]) -> None:
        self.found: set[str] = set()
        self.owner = ""
        self.names: dict[str, set[str]] = {}  # classes by variable
        self.words: dict[str, set[str]] = {}  # strings by variable, for getattr
        self.fields: dict[str, dict[str, set[str]]] = defaultdict(dict)
        self.results: dict[str, set[str]] = {}
        trees = [parse(text) for text in (*SOURCES.values(), *sources)]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        self.known = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
                types = {ast.unparse(x.target): self.annotated(x.annotation) for x in lines}
                self.fields[node.name] |= types
            elif isinstance(node, ast.FunctionDef):
                self.results[node.name] = self.annotated(node.returns)
            elif isinstance(node, ast.Assign):
                self.words[ast.unparse(node.targets[0])] = self.strings(node.value)
        for text in sources:
            self.visit(parse(text))

    def annotated(self, annotation: ast.expr | None) -> set[str]:
        nodes = [] if annotation is None else ast.walk(annotation)
        return {node.id for node in nodes if isinstance(node, ast.Name)} & self.known

    def strings(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.Name):
            return self.words.get(node.id, set())
        parts = node.elts if isinstance(node, ast.Tuple) else [node]
        return {x.value for x in parts if isinstance(x, ast.Constant) and isinstance(x.value, str)}

    def attributes(self, node: ast.AST) -> set[tuple[str, str]]:
        """Returns the class and the field of each attribute that an expression may read."""
        match node:
            case ast.Attribute(value=value, attr=attr):
                return {(owner, attr) for owner in self.classes(value)}
            case ast.Call(func=ast.Name(id="getattr"), args=[value, name, *_]):
                return {(o, attr) for o in self.classes(value) for attr in self.strings(name)}
        return set()

    def classes(self, node: ast.AST) -> set[str]:
        """Returns the classes that an expression's value may have."""
        match node:
            case ast.Name(id=name):
                return self.names.get(name, set())
            case ast.Call(func=ast.Name(id="replace") | ast.Attribute(attr="replace")):
                return self.classes(node.args[0]) if node.args else set()
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)) if name != "getattr":
                return {name} & self.known or self.results.get(name, set())
            case ast.Tuple() | ast.List() | ast.BinOp() | ast.BoolOp() | ast.IfExp():
                return {c for child in ast.iter_child_nodes(node) for c in self.classes(child)}
        found = self.attributes(node)
        return {c for owner, attr in found for c in self.fields[owner].get(attr, set())}

    def assign(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, other in zip(target.elts, value.elts, strict=False):
                self.assign(one, other)
        elif isinstance(target, ast.Name):
            self.names[target.id] = self.classes(value)
            self.words[target.id] = self.strings(value)
        elif isinstance(target, ast.Attribute):
            for owner, attr in self.attributes(target):
                self.fields[owner][attr] = self.classes(value)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.owner = node.name
        self.generic_visit(node)
        self.owner = ""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer = self.names
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        own = {arg.arg: self.annotated(arg.annotation) for arg in arguments}
        self.names = {**outer, **own} | ({"self": {self.owner}} if self.owner else {})
        self.generic_visit(node)
        self.names = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.assign(target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self.assign(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.assign(node.target, node.iter)
        self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        for part in getattr(node, "generators", []):  # they name what the element reads
            self.visit(part)
        if not isinstance(getattr(node, "ctx", None), ast.Store):
            self.found |= {f"{owner}.{attr}" for owner, attr in self.attributes(node)}
        super().generic_visit(node)


@pytest.fixture(scope="module")
def found() -> set[str]:
    return Reader(READERS).found


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_read(field, found):
    assert field in found


USES = """
def f(config: Config, data: DataConfig, batch):
    batch.path, config.split, config.eval.keep, data.every_steps = 1, 2, 3, 4
    rows = config.data
    print(rows.overlong, rows.unread_field, config.checkpoint, batch.steps, path, epochs)
    return [getattr(config.mesh, name) for name in ("fsdp", "unread_axis")]
"""


def test_a_field_that_only_has_a_name_in_common_is_not_read():
    """Twin: fields of other classes, assigned fields and plain names count for nothing."""
    config = {"data", "eval", "checkpoint", "mesh"}
    want = {f"Config.{name}" for name in config} | {"DataConfig.overlong"}
    want |= {"DataConfig.unread_field", "MeshConfig.fsdp", "MeshConfig.unread_axis"}
    assert Reader([USES]).found == want
    without = [text.replace(".clip_norm", ".epsilon") for text in READERS]
    assert set(FIELDS) - Reader(without).found == {"OptimConfig.clip_norm"}
