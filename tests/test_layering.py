"""The order of the packages: imports point up this list, inside functions as well."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "neounify"

ORDER = """
errors          exceptions and warnings
deprecation     old names that keep working
files           bounded reads, atomic writes, folders with one writer
terminal        progress bars
plugins         objects of the user, by name
services        services of others over HTTP
bundled         the folder of the model that comes with the package
config          what a model and a request consist of
runtime         settings of the whole process, limits of a model on a device
text            tokenizer, messages, prompts
image           untrusted images, sizes, patches
video           clips, untrusted video files, choice of frames
grammar         constrained decoding
flow            path, schedule, noise, guidance, solvers
model           layout, streams, heads: the network
cache           KV caches: storage
attention       attention backends over layouts and caches
decode          token sampling
quant           formats of quantised weights
checkpoint      the published folders, weights
lora            adapters
distributed     ranks, meshes, sharding of a model from outside
provenance      metadata and watermarks of generated images
engine          the two loops over the model
tasks           one program per task, without I/O
pipeline        the public Python API
neounify        the names that `import neounify` gives
data            samples, sources, packing, loading
evaluate        similarity of images, rates and means with confidence intervals, paired tests
curate          curation of data: stages, copies, table and shards
scenes          synthetic scenes and SceneBench
motion          synthetic clips and MotionBench
train           recipes and the trainer
post_train      reinforcement learning, distillation, merging of experts
bench           public benchmarks: prompts, outputs, judges, results
serve           the service, its engines' processes, HTTP
cli             the command line
__main__        `python -m neounify`
"""
COMING: set[str] = set()
"""In the order already, and not yet in the tree."""

EXCUSED = {
    ("provenance/metadata.py", "neounify"): "reads nothing but the version",
}
"""Imports down the list, by importing file and imported package: why each is right."""


def packages() -> list[str]:
    return [line.split()[0] for line in ORDER.strip().splitlines()]


def imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, module, whether it runs on import) for every import of our modules in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(node) for holder in ast.walk(tree) if _is_later(holder) for node in ast.walk(holder)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} is a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.partition(".")[0] == "neounify":
                assert isinstance(node, ast.stmt)
                yield node.lineno, _module(name), id(node) not in later


def _is_later(node: ast.AST) -> bool:
    """Whether what stands in it does not run when the file is imported."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def _module(name: str) -> str:
    """The module that an import names, without the name of what is taken out of it."""
    while "." in name:
        path = SOURCE.joinpath(*name.split(".")[1:])
        if path.is_dir() or path.with_suffix(".py").is_file():
            return name
        name = name.rpartition(".")[0]
    return name


def _package(module: str) -> str:
    """`neounify.serve.http` -> `serve`; `neounify` itself stands for its own names."""
    return ([*module.split("."), ""])[1] or module


def _name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(SOURCE.rglob("*.py"))


def test_every_package_has_a_place_in_the_order() -> None:
    there = {_package(_name(path)) for path in FILES}
    assert not there - set(packages()), "give it a line in ORDER"
    assert set(packages()) - there <= COMING, "this line of ORDER stands for nothing"


def test_imports_point_up_the_list() -> None:
    order = {package: number for number, package in enumerate(packages())}
    wrong, excused = [], set()
    for path in FILES:
        importer, file = _package(_name(path)), path.relative_to(SOURCE).as_posix()
        for line, module, _ in imports(path):
            package = _package(module)
            if order[package] <= order[importer]:
                continue
            if (file, package) in EXCUSED:
                excused.add((file, package))
            else:
                wrong.append(f"{file}:{line} imports {module}: {package} is below {importer}")
    assert not wrong, "\n".join(wrong)
    assert excused == set(EXCUSED), "an excuse that nothing needs"


WITHOUT_FAMILIES = ("model", "flow", "pipeline", "tasks", "engine")
"""Packages that read fields of a config and never its family."""


def comparisons_of_family(text: str) -> list[int]:
    """Lines of a source that compare a family of checkpoints, or match on it."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            sides = [node.subject]
        names = {getattr(side, "attr", getattr(side, "id", "")) for side in sides}
        if names & {"family", "SENSENOVA_U1", "PIXELUMM"}:
            lines.append(sides[0].lineno)
    return lines


def test_layers_flow_and_tasks_never_ask_for_the_family() -> None:
    asking = [
        f"{path.relative_to(SOURCE).as_posix()}:{line}"
        for path in FILES
        if _package(_name(path)) in WITHOUT_FAMILIES
        for line in comparisons_of_family(path.read_text(encoding="utf-8"))
    ]
    assert not asking, "make what differs a field of the config"


def test_a_comparison_of_families_is_found() -> None:
    text = (
        "if config.family == 'pixelumm':\n    pass\nx = family in ('a',)\ny = PIXELUMM != z\n"
        "match c.family:\n    case _: pass\ntitle = title_of(config.family)\nz = c.width == 1\n"
    )
    assert sorted(comparisons_of_family(text)) == [1, 3, 4, 5]


def test_no_modules_import_each_other() -> None:
    graph = {
        _name(path): {module for _, module, on_import in imports(path) if on_import} - {_name(path)}
        for path in FILES
        if path.name != "__init__.py"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_an_import_is_found_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "import os\nimport neounify\nfrom neounify.errors import NeounifyError\n"
        "def f():\n    from neounify.model import Layout\n    import neounify.serve.http\n"
        "if TYPE_CHECKING:\n    import neounify.cli\n"
    )
    assert sorted(imports(file)) == [
        (2, "neounify", True),
        (3, "neounify.errors", True),
        (5, "neounify.model", False),
        (6, "neounify.serve.http", False),
        (8, "neounify.cli", False),
    ]
