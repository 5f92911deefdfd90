"""The plan of the house: imports run one way, files stay short, and nothing unpickles."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fastlur

ROOT = Path(fastlur.__file__).parent
REPOSITORY = Path(__file__).parent.parent
MODULES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path
    for path in ROOT.rglob("*.py")
    if path.name not in ("__init__.py",)
} | {name: ROOT / name / "__init__.py" for name in ("methods", "audit", "llm")}
SHARED = {f"methods.{name}" for name in ("base", "components", "importance", "relabelling", "repair")}

# From the ground up: a module may import only what stands on a lower floor than itself.
FLOORS = [
    {"stats", "_version", "errors", "reference", "_extension", "placement", "task", "graph"},
    {"backends", "capture", "footprint", "operands", "world", "leaves", "value", "rows"},
    {"slots"},
    {"memory", "batches"},
    {"sharing"},
    {"serving"},
    {"ops"},
    {
        "statistics",
        "losses",
        "info",
        "data",
        "twice",
        "outputs",
        "attacks",
        "folder",
        "packing",
        "interrupt",
        "identity",
    },
    {"space", "ours", "virtual_norm", "llm.likelihood", "llm.text", "texts"},
    {"curvature", "snapshot", "fitting", "microbatch", "moving", "reach", "answers"},
    {"passes", "meta", "scores"},
    {"content", "methods.base", "frozen", "fresh", "membership"},
    {"methods.components", "methods.importance", "methods.relabelling"},
    {"overlap", "checks", "update", "culprit"},
    {"imitation"},
    {"targets", "llm.preferred", "llm.sampling"},
    {"target_state", "llm.reference"},
    {"llm.forgetting", "llm.representation"},
    {"llm.core", "llm.collapse"},
    {"methods.repair"},
    {name for name in MODULES if name.startswith("methods.")} - SHARED - {"methods.lur_presets"},
    {"methods.lur_presets"},
    {"methods"},
    {"step", "look"},
    {"history", "meta_step", "integrations.trainer"},
    {"fingerprints", "record"},
    {"statement"},
    {"loop", "result", "verify"},
    {"budget", "estimate", "evaluate", "likelihood", "whole_state", "stopping"},
    {"checkpoint"},
    {"checkpointer", "purge"},
    {"api", "audit.items"},
    {"audit.matching"},
    {"audit.inversion", "audit.relearning"},
    {"audit", "llm", "integrations.open_unlearning"},
    {"demo"},
    {"picture"},
    {"__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastlur":
            base = node.module.removeprefix("fastlur").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}" if base else alias.name
                found.add(inner if inner in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("fastlur.") for a in node.names if a.name.startswith("fastlur.")}
    return found - {""}


def test_every_module_stands_on_a_floor():
    assert set(FLOOR) == set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_downwards(name):
    upwards = {other for other in imported(MODULES[name]) if FLOOR[other] >= FLOOR[name]}
    assert not upwards


@pytest.mark.parametrize("path", sorted((REPOSITORY / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_triton_and_their_siblings_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "fastlur" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level > 0 or (node.module or "").split(".")[0] != "fastlur"


def test_below_the_top_nothing_knows_a_file_format_or_a_plot():
    known = {"json", "safetensors", "matplotlib", "pickle", "tqdm"}
    top = {"api", "checkpoint", "record", "picture", "__main__", "demo", "loop"}
    for name, path in MODULES.items():
        if name not in top:
            tree = ast.walk(ast.parse(path.read_text()))
            roots = {a.name.split(".")[0] for n in tree if isinstance(n, ast.Import) for a in n.names}
            assert not roots & known, name


def test_nothing_is_ever_unpickled():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                names = [alias.name for alias in node.names] if module is None else [module]
                assert not {n.split(".")[0] for n in names} & {"pickle", "dill", "joblib", "shelve"}, name
            elif isinstance(node, ast.Attribute) and node.attr == "load":
                assert not (isinstance(node.value, ast.Name) and node.value.id in ("torch", "numpy", "np")), name


@pytest.mark.parametrize("path", sorted(MODULES.values()), ids=lambda p: p.name)
def test_a_file_is_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= 320


def test_the_public_names():
    assert {"unlearn", "Result", "LUR", "MetaStep", "meta_gradient", "evaluate", "info"} <= set(fastlur.__all__)
    assert "lur" in fastlur.methods.available()
    assert all(hasattr(fastlur, name) for name in fastlur.__all__)


def from_the_root(code):
    code = f"import sys; sys.path.insert(0, sys.argv[1]); {code}"
    return subprocess.run([sys.executable, "-c", code, str(REPOSITORY)], capture_output=True, text=True, cwd="/")


@pytest.mark.parametrize("code", ["from kernels import displace", "import kernels; kernels.displace"])
def test_kernels_are_not_given_away_by_the_name_of_another_project(code):
    done = from_the_root(code)
    assert done.returncode != 0
    assert "fastlur.kernels" in done.stderr
    importlib.import_module("fastlur.kernels")


def test_others_who_look_for_that_project_are_not_disturbed():
    """transformers imports whatever has the name, and does without it where it tells no version."""
    pytest.importorskip("transformers")
    done = from_the_root("import kernels; from transformers import LlamaForCausalLM")
    assert done.returncode == 0, done.stderr


def test_the_figures_of_the_readme_are_those_of_the_committed_results():
    done = subprocess.run([sys.executable, str(REPOSITORY / "bench" / "report.py"), "--check"], check=False)
    assert done.returncode == 0, "run `make report`"


@pytest.mark.parametrize(
    "path", [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_no_figure_is_left_to_be_filled_in(path):
    assert "@@" not in path.read_text()
