"""The house rules that a reader relies on: order of the modules, tree in the README, documentation, no pickle."""
import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "kdp_core"
COMMANDS = ROOT / "kdp"
SPELLED_OUT = ("kdp_core",)
"""Folders whose own folders stand in the README's tree too."""
MOST_MODULES, MOST_LINES, MOST_PLANNING_LINES = 16, 350, 250
"""A reader can take in a folder of so many modules, and a module of so many lines."""


def folder_of(path: Path) -> str:
    """The folder of kdp_core that a file lies in, as kdp_core/__init__.py lists it."""
    return path.relative_to(CORE).parts[0]


def files() -> list[Path]:
    """Python files of kdp_core, those read by other tools as data (folders without __init__.py) in."""
    return sorted(path for path in CORE.rglob("*.py") if "__pycache__" not in path.parts)


def commands() -> list[Path]:
    """Python files of the command line."""
    return sorted(COMMANDS.glob("*.py"))


def modules() -> list[Path]:
    """Files that make up the package, but for its own __init__.py."""
    return [path for path in files() if path != CORE / "__init__.py" and (path.parent / "__init__.py").exists()]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def listed() -> list[str]:
    """Folders in the order of the package's docstring: its indented lines."""
    return re.findall(r"^ {4}(\w+) ", ast.get_docstring(parsed(CORE / "__init__.py"), clean=False), re.MULTILINE)


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all that is imported, wherever in the file it stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "kdp_core" if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def of_core(tree: ast.AST) -> set[str]:
    """Folders of kdp_core among the imports."""
    return {name.split(".")[1] for name in imported(tree) if name.startswith("kdp_core.")}


def upward(order: list[str], folder: str, needs: set[str]) -> list[str]:
    """Folders that a file may not import from: those further down the list than its own."""
    return sorted(need for need in needs if need in order and order.index(need) > order.index(folder))


def dotted(path: Path) -> str:
    """The name that a file is imported by."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Every module of kdp_core with the modules that it imports; importing a module does not count its packages."""
    names = {dotted(path): path for path in modules()}
    return {name: {max((known for known in names if (need + ".").startswith(known + ".")), key=len, default="")
                   for need in imported(parsed(path)) if need.startswith("kdp_core.")} & set(names) - {name}
            for name, path in names.items()}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that are in an import cycle or depend on one; empty without a cycle."""
    left = dict(graph)
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    return sorted(left)


def calls(tree: ast.AST) -> set[str]:
    """Names of all that is called, as written: `print`, `torch.save`."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def relative(paths) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_docstring_lists_every_module_of_the_command_line():
    names = re.findall(r"^ {4}(\w+) ", ast.get_docstring(parsed(COMMANDS / "__init__.py"), clean=False), re.MULTILINE)
    assert sorted(names) == sorted(path.stem for path in commands() if not path.stem.startswith("__"))


def test_docstring_lists_every_folder_once_and_no_other():
    assert sorted(listed()) == sorted({folder_of(path) for path in modules()})


@pytest.mark.parametrize("path", modules(), ids=relative(modules()))
def test_imports_point_upward(path):
    order, needs = listed(), of_core(parsed(path))
    assert folder_of(path) in order, f"add {folder_of(path)} to the list in kdp_core/__init__.py"
    assert needs <= set(order), "imports of kdp_core name modules, not what the package itself might hold"
    assert upward(order, folder_of(path), needs) == []


def test_no_module_is_in_an_import_cycle():
    assert cycle(import_graph()) == []


def crowded(paths: list[str], most: int) -> list[str]:
    """Folders with more than `most` modules, each with their number; the folder's own __init__.py does not count."""
    counts = Counter(str(Path(path).parent) for path in paths if path.endswith(".py") and Path(path).stem != "__init__")
    return [f"{folder}: {count}" for folder, count in sorted(counts.items()) if count > most]


def test_no_folder_of_the_checkout_is_crowded():
    if not (tracked := git_files()):
        pytest.skip("not in a git checkout")
    assert crowded(tracked, MOST_MODULES) == [], f"at most {MOST_MODULES} modules a folder; split it by topic"


def test_a_crowded_folder_is_seen():
    assert crowded(["a/b.py", "a/c.py", "a/__init__.py", "a/d.md", "a/e/f.py", "g.py"], 1) == ["a: 2"]


def test_no_module_is_long():
    if not (tracked := git_files()):
        pytest.skip("not in a git checkout")
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in tracked
             if name.endswith((".py", ".smk")) and not name.startswith("tests/")}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_the_modules_of_planning_are_short_and_the_rules_hold_no_module():
    planning = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in
                (ROOT / "workflow_scripts/planning").glob("*.py")}
    assert {name: count for name, count in planning.items() if count > MOST_PLANNING_LINES} == {} != planning
    assert list((ROOT / "rules").rglob("*.py")) == []


def test_a_cycle_is_seen():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert cycle({"a": {"b"}, "b": set()}) == []


def test_imports_are_read_in_every_form():
    tree = ast.parse("import kdp_core.base.store\nfrom kdp_core.prune import fold as f, finetune\n"
                     "def inner():\n    from kdp_core.score.tasks import as_pairs\n    from . import results\n")
    assert of_core(tree) == {"base", "prune", "score", "results"}
    assert upward(["base", "states", "prune"], "states", {"base", "states", "prune"}) == ["prune"]


@pytest.mark.parametrize("path", files(), ids=relative(files()))
def test_no_snakemake_no_printing_no_pickle(path):
    tree = parsed(path)
    tops = {name.split(".")[0] for name in imported(tree)}
    assert not tops & {"kdp", "snakemake", "pickle", "cloudpickle", "dill", "joblib", "shelve"}
    assert not imported(tree) & {"torch.save", "torch.load"}
    assert not calls(tree) & {"print", "torch.save", "torch.load", "pd.read_pickle", "pandas.read_pickle"}
    assert not any(name.endswith(".to_pickle") for name in calls(tree))
    assert "allow_pickle" not in {word.arg for node in ast.walk(tree) if isinstance(node, ast.Call)
                                  for word in node.keywords}


MODEL_TYPES = CORE / "model/families.py"
"""The one module that names model types."""
NAMES_OF_OTHERS = {CORE / "study/planner.py": "configurations as they were published",
                   CORE / "model/gguf_file.py": "GGUF names ways to split text by the models that have them",
                   CORE / "model/gguf_export.py": "GGUF names ways to split text by the models that have them",
                   CORE / "results/paper.py": "the paper prints OPT models in tables of their own"}
"""Modules that name a model type all the same, with the reason."""
WORDS = {"beam", "clip", "git"}
"""Model types that are names of other things here."""


def family_faults(tree: ast.AST, types: set[str]) -> list[str]:
    """Model types that a module names as strings, and comparisons of a model's type."""
    named = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in types]
    compared = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)
                for one in (node.left, *node.comparators) if ast.unparse(one).endswith(".model_type")]
    return [*named, *compared]


@pytest.mark.parametrize("path", modules(), ids=relative(modules()))
def test_only_families_names_model_types(path):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if path != MODEL_TYPES and path not in NAMES_OF_OTHERS:
        assert family_faults(parsed(path), set(CONFIG_MAPPING_NAMES) - WORDS) == []


def test_a_named_model_type_is_seen():
    tree = ast.parse('a = "llama"\nb = config.model_type != other.config.model_type\nc = "a llama"\n')
    assert family_faults(tree, {"llama"}) == ["llama", *["config.model_type != other.config.model_type"] * 2]


def missing_annotations(function: ast.FunctionDef) -> list[str]:
    """Arguments without a type, and `return`."""
    spec = function.args
    arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    bare = [one.arg for one in arguments if one.annotation is None and one.arg not in ("self", "cls")]
    return bare + ["return"] * (function.returns is None)


@pytest.mark.parametrize("path", files() + commands(), ids=relative(files() + commands()))
def test_functions_are_annotated_and_public_ones_documented(path):
    tree = parsed(path)
    assert ast.get_docstring(tree), "a module opens with what it computes"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    bare = {node.name: found for node in functions if (found := missing_annotations(node))}
    assert bare == {}
    public = [node for node in tree.body
              if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_"]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_missing_annotations_are_seen():
    function, = ast.parse("def f(self, a, b: int, *rest, c=1, **more: int): pass").body
    assert missing_annotations(function) == ["a", "c", "rest", "return"]


def tree_block(readme: str) -> list[str] | None:
    """Lines of the first fenced block after a heading with `tree` or `layout` in it; None without one."""
    heading, fenced, lines = False, False, []
    for line in readme.splitlines():
        if line.lstrip().startswith("```"):
            if heading and fenced:
                return lines
            fenced = not fenced
        elif fenced and heading:
            lines.append(line)
        elif not fenced and re.match(r"#+ .*\b(tree|layout)\b", line, re.IGNORECASE):
            heading = True
    return None


def tree_paths(lines: list[str]) -> set[str]:
    """Paths of a tree: the first word of each line, below the last line that was indented less."""
    above: list[tuple[int, str]] = []
    paths = set()
    for line in lines:
        bare = line.lstrip(" │├└─|`")
        if not bare:
            continue
        indent, word = len(line) - len(bare), bare.split()[0]
        above = [(depth, name) for depth, name in above if depth < indent]
        path = (above[-1][1] if above else "") + word
        paths.add(path)
        if word.endswith("/"):
            above.append((indent, path))
    return paths


def tree_faults(paths: set[str], tracked: list[str]) -> list[str]:
    """What the tree leaves out and what it invents.

    Every top-level entry must be listed, and every folder in the folders SPELLED_OUT.
    """
    folders = {"/".join(path.split("/")[:depth]) + "/" for path in tracked for depth in range(1, path.count("/") + 1)}
    tops = {path.split("/")[0] + "/" * ("/" in path) for path in tracked}
    inner = {folder for folder in folders if folder.split("/")[0] in SPELLED_OUT and folder.count("/") == 2}
    left_out = (tops | inner) - paths
    return sorted(f"left out: {path}" for path in left_out) + \
        sorted(f"not there: {path}" for path in paths - folders - set(tracked))


def git_files() -> list[str]:
    try:
        found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return found.splitlines()


def test_readme_tree_is_the_tree():
    if not (tracked := git_files()):
        pytest.skip("not in a git checkout")
    lines = tree_block((ROOT / "README.md").read_text(encoding="utf-8"))
    assert lines is not None, "README.md needs a heading with `Tree` or `Layout` and a fenced block below it"
    assert tree_faults(tree_paths(lines), tracked) == []


TRACKED = ["README.md", "Snakefile", "kdp_core/__init__.py", "kdp_core/base/store.py", "kdp_core/methods/__init__.py",
           "kdp_core/methods/kdp/kernel.py", "tests/test_a.py", "profiles/slurm/config.yaml"]
README = """# x
```
not this one
```
## The tree, one line a folder
```
README.md            what it is
Snakefile            targets
kdp_core/            the library
    base/            records
    methods/         every method
tests/               mirror
profiles/
├── slurm/
│   └── config.yaml  many jobs
```
"""


@pytest.mark.parametrize("old, new, faults", [
    ("", "", []),
    ("    base/            records\n", "", ["left out: kdp_core/base/"]),
    ("Snakefile            targets\n", "", ["left out: Snakefile"]),
    ("tests/               mirror\n", "", ["left out: tests/"]),
    ("base/ ", "bases/ ", ["left out: kdp_core/base/", "not there: kdp_core/bases/"]),
    ("    methods/  ", "    methods/  all\n        b.py", ["not there: kdp_core/methods/b.py"]),
])
def test_tree_faults_are_seen(old, new, faults):
    assert old in README
    assert tree_faults(tree_paths(tree_block(README.replace(old, new, 1) if old else README)), TRACKED) == faults


def test_no_tree_is_no_tree():
    assert tree_block("# Tree\nwords\n") is None
    assert tree_block(README.replace("tree", "files")) is None


NO_MODEL = ("kdp_core.model.checkpoints", "kdp_core.model.passes", "kdp_core.model.surgery", "kdp_core.base.texts",
            "kdp_core.states.hidden")
"""Modules that load no model. One process imports them all, because each process would import torch."""


def test_modules_that_load_no_model_take_no_transformers():
    code = "import sys\n" + "".join(f"import {name}; print({name!r}, 'transformers' in sys.modules)\n"
                                     for name in NO_MODEL)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} False" for name in NO_MODEL]


TORCH = ("torch", "transformers", "scipy")
"""Packages that take more than a second to import."""
TABLES = ("pandas", "matplotlib", "numpy")
"""Packages without which the import of a module takes a few hundredths of a second."""
LIGHT = ("base.options", "base.records", "base.measurements", "base.store", "base.provenance", "model.families",
         "model.sizes", "model.assets", "results.columns", "results.page", "score.metrics")
"""Modules that are read before any work."""
SHOW = ("figures", *(f"results.{path.stem}" for path in sorted((ROOT / "kdp_core/results").glob("*.py"))
                     if path.stem not in ("__init__", "card", "costs")))
"""Modules that show plain numbers. A card names its method, and the costs of a model are counted by its classes."""


@pytest.mark.parametrize("names, without", [(LIGHT, TORCH + TABLES), (SHOW, TORCH)], ids=["light", "show"])
def test_light_modules_import_no_heavy_package(names, without):
    code = "".join(f"import kdp_core.{name}\n" for name in names) + \
        f"import sys; sys.exit(' '.join(set({without}) & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
