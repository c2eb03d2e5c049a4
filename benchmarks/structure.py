"""Measure the size and density of the product's code: launch/, rlhf/ and reward/.

    python -m benchmarks.structure                    # this tree, by package
    python -m benchmarks.structure --against OTHER    # beside another checkout, in all

Docstrings count neither as statements nor as code lines. A circle is a cycle of imports between
modules, those inside functions included, those for type checking excluded.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.paths import ROOT

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
NOT_CODE = (
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.COMMENT,
)


@dataclass
class Size:
    files: int = 0
    lines: int = 0
    statements: int = 0
    code_lines: int = 0
    comprehensions: int = 0
    comment_lines: int = 0
    longest_function: tuple[int, str] = (0, "")
    longest_file: tuple[int, str] = (0, "")

    def add(self, other: Size) -> None:
        for name in (
            "files",
            "lines",
            "statements",
            "code_lines",
            "comprehensions",
            "comment_lines",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest_function = max(self.longest_function, other.longest_function)
        self.longest_file = max(self.longest_file, other.longest_file)


@dataclass
class Tree:
    packages: dict[str, Size] = field(default_factory=dict)
    total: Size = field(default_factory=Size)
    circles: list[list[str]] = field(default_factory=list)


def measure(root: Path) -> Tree:
    tree, imports = Tree(), {}
    files = [
        *(root / "launch").rglob("*.py"),
        *(root / "rlhf").rglob("*.py"),
        *(root / "reward").rglob("*.py"),
    ]
    modules = {module_name(path, root) for path in files}
    for path in sorted(files):
        source = path.read_text(encoding="utf-8")
        parsed = ast.parse(source)
        size = size_of(source, parsed, str(path.relative_to(root)))
        tree.packages.setdefault(package_name(path, root), Size()).add(size)
        tree.total.add(size)
        imports[module_name(path, root)] = imports_of(parsed) & modules
    tree.circles = circles(imports)
    return tree


def package_name(path: Path, root: Path) -> str:
    """Return the folder of a file, such as rlhf/data/prepare."""
    return path.parent.relative_to(root).as_posix()


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def size_of(source: str, parsed: ast.Module, name: str) -> Size:
    docstrings = [node.body[0] for node in ast.walk(parsed) if has_docstring(node)]
    docstring_lines: set[int] = set()
    for doc in docstrings:
        docstring_lines.update(range(doc.lineno, doc.end_lineno + 1))
    code_lines, comment_lines = set(), 0
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            code_lines.update(range(token.start[0], token.end[0] + 1))
        elif token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#"):
            comment_lines += 1

    nodes = list(ast.walk(parsed))
    lengths = [
        (node.end_lineno - node.lineno + 1, f"{name}:{node.name}")
        for node in nodes
        if isinstance(node, FUNCTIONS)
    ]
    return Size(
        files=1,
        lines=len(lines),
        statements=sum(isinstance(node, ast.stmt) for node in nodes) - len(docstrings),
        code_lines=len(code_lines - docstring_lines),
        comprehensions=sum(isinstance(node, COMPREHENSIONS) for node in nodes),
        comment_lines=comment_lines,
        longest_function=max(lengths, default=(0, "")),
        longest_file=(len(lines), name),
    )


def has_docstring(node: ast.AST) -> bool:
    if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) or not node.body:
        return False
    first = node.body[0]
    return (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )


def imports_of(parsed: ast.Module) -> set[str]:
    """Return the modules and names that are imported anywhere in the file, functions included."""
    typing_only = set()
    for node in ast.walk(parsed):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            typing_only.update(id(inner) for inner in ast.walk(node))
    found: set[str] = set()
    for node in ast.walk(parsed):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other (strongly connected components, Tarjan
    1972).
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(imports[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            cut = stack.index(module)
            members = stack[cut:]
            del stack[cut:]
            if len(members) > 1:
                found.append(sorted(members))

    for module in sorted(imports):
        if module not in index:
            visit(module)
    return found


def rows_of(tree: Tree) -> list[tuple[str, str]]:
    total = tree.total
    hundred = 100 / total.code_lines
    return [
        ("files", f"{total.files}"),
        ("lines", f"{total.lines:,}"),
        ("statements", f"{total.statements:,}"),
        ("code lines", f"{total.code_lines:,}"),
        ("statements a code line", f"{total.statements / total.code_lines:.2f}"),
        ("comprehensions per 100 code lines", f"{total.comprehensions * hundred:.1f}"),
        ("own-line comments per 100 code lines", f"{total.comment_lines * hundred:.1f}"),
        ("longest function", "{} ({})".format(*total.longest_function)),
        ("longest file", "{} ({})".format(*total.longest_file)),
        ("import circles", f"{len(tree.circles)}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--against", type=Path, help="another checkout, shown as 'before'")
    options = parser.parse_args()
    tree = measure(options.root)
    columns = [rows_of(tree)]
    if options.against:
        columns.insert(0, rows_of(measure(options.against)))
    header = ["measure", "before", "after"] if options.against else ["measure", "value"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in zip(*columns, strict=True):
        print("| " + " | ".join([row[0][0], *(value for _, value in row)]) + " |")
    print(
        "\n| package | files | statements | a code line | comprehensions | comments |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, size in sorted(tree.packages.items()):
        hundred = 100 / max(1, size.code_lines)
        print(
            f"| {name} | {size.files} | {size.statements} | {size.statements / max(1, size.code_lines):.2f} | "
            f"{size.comprehensions * hundred:.1f} | {size.comment_lines * hundred:.1f} |"
        )
    for members in tree.circles:
        print(f"\ncircle: {', '.join(members)}")


if __name__ == "__main__":
    main()
