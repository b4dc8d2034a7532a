"""The size budgets and habits of DESIGN.md section 3, over every module of the package."""

import ast
import re
import statistics
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "gateway").rglob("*.py"))
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in MODULES}
LINES = {path.relative_to(ROOT): path.read_text().splitlines() for path in MODULES}
FUNCTIONS = [
    (f"{path}:{node.lineno} {node.name}", node)
    for path, tree in TREES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]
BRANCHES = (
    ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case, ast.comprehension,
)  # fmt: skip


def length(node):
    return node.end_lineno - node.lineno + 1


def own_nodes(function):
    """The nodes of a function without those of functions inside it."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def test_there_is_something_to_measure():
    assert len(MODULES) > 30
    assert len(FUNCTIONS) > 300


def test_modules_are_small():
    sizes = {str(path): len(lines) for path, lines in LINES.items()}
    assert {path: size for path, size in sizes.items() if size > 400} == {}
    assert statistics.median(sizes.values()) <= 150


def test_functions_are_small():
    sizes = {name: length(node) for name, node in FUNCTIONS}
    assert {name: size for name, size in sizes.items() if size > 60} == {}
    assert sorted(sizes.values())[int(len(sizes) * 0.95)] <= 35


def test_functions_take_at_most_seven_parameters():
    def count(arguments):
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        return len([each for each in named if each.arg not in ("self", "cls")])

    assert {name: count(node.args) for name, node in FUNCTIONS if count(node.args) > 7} == {}


def test_functions_are_simple():
    """Complexity as ruff's C901 counts it, but for comprehensions and conditional expressions, counted too, up to 12."""

    def paths(node):
        return 1 + sum(isinstance(each, BRANCHES) for each in own_nodes(node))

    assert {name: paths(node) for name, node in FUNCTIONS if paths(node) > 12} == {}


def test_modules_do_not_import_each_other_in_circles():
    graph = grimp.build_graph("gateway", cache_dir=None)
    circles = []
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            back = graph.find_shortest_chain(imported, module)
            if back is not None:
                circles.append(" > ".join([module, *back]))
    assert circles == []


def test_what_is_public_says_what_it_is():
    silent = [str(path) for path, tree in TREES.items() if not ast.get_docstring(tree)]
    for path, tree in TREES.items():
        silent += [f"{path}:{node.lineno} {node.name}" for node in public(tree) if not ast.get_docstring(node)]
    assert silent == []


def public(tree):
    """The public classes and functions of a module and the public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node)


def test_a_handler_of_every_exception_gives_its_reason():
    broad = re.compile(r"except (Base)?Exception\b[^#]*(?P<comment>#.*)?$")
    unexplained = []
    for path, lines in LINES.items():
        for number, line in enumerate(lines, start=1):
            found = broad.search(line)
            if found is None or _only_passes_on(path, number):
                continue
            reason = re.sub(r"#|noqa(: *[A-Z0-9, ]+)?", "", found["comment"] or "").strip(" -")
            if len(reason) < 10 and not lines[number].strip().startswith("# "):
                unexplained.append(f"{path}:{number}")
    assert unexplained == []


def _only_passes_on(path, number):
    """A `BaseException` handler that cleans up and raises the same error again swallows nothing."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ExceptHandler) and node.lineno == number:
            last = node.body[-1]
            return isinstance(last, ast.Raise) and last.exc is None
    return False


def test_every_task_belongs_to_a_task_group():
    """`create_task` is called on a name bound by `async with TaskGroup()` or handed in as a `TaskGroup`."""
    loose = []
    for path, tree in TREES.items():
        calls = [
            node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        ]
        made = [call for call in calls if call.attr in ("create_task", "ensure_future")]
        groups = _groups(tree) if made else set()
        loose += [
            f"{path}:{call.lineno} {ast.unparse(call)}"
            for call in made
            if call.attr == "ensure_future" or ast.unparse(call.value) not in groups
        ]
    assert loose == []


def _groups(tree):
    """Every name in a module that holds a task group."""
    names = set()
    for node in [*ast.walk(tree), *ast.walk(tree)]:  # twice: a name may be passed on before it is seen bound
        if isinstance(node, ast.withitem) and node.optional_vars:
            bound, value = node.optional_vars, node.context_expr
        elif isinstance(node, ast.Assign):
            bound, value = node.targets[0], node.value
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            bound, value = getattr(node, "target", None) or ast.Name(node.arg), node.annotation
        else:
            continue
        if "TaskGroup" in ast.unparse(value) or ast.unparse(value) in names:
            names |= {ast.unparse(bound), f"self.{ast.unparse(bound)}"}  # a dataclass binds both
    return names


def test_only_the_configuration_reads_the_environment():
    readers = [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        if path.parts[:2] != ("gateway", "config")
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os")
        or (isinstance(node, ast.Name) and node.id == "environ")
    ]
    assert readers == []


def test_the_code_says_why():
    """3 to 7 comments per 100 lines is the habit; only their absence is an error."""
    comments = sum(1 for lines in LINES.values() for line in lines if re.search(r"(^|\s)# (?!noqa|type:|fmt:)", line))
    assert comments / sum(map(len, LINES.values())) >= 0.01


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the map is drawn when there is a README")
def test_the_readme_lists_every_module():
    readme = (ROOT / "README.md").read_text()
    modules = [
        path.relative_to(ROOT / "gateway") for path in MODULES if path.name not in ("__init__.py", "__main__.py")
    ]
    assert [str(path) for path in modules if f"gateway/{path.as_posix()}" not in readme] == []
