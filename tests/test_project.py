"""The laws of the project, as tests: what a folder may import, what lies where, what no file may do.

Each law is a function from source text to a list of complaints. It is run on the whole project, and on a planted
violation, so that a law that no longer sees anything fails too.
"""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import rmcore
from rmcore.__main__ import COMMANDS as COMMANDS_OF_THE_CONSOLE
from rmcore.__main__ import MODULES as MODULES_OF_COMMANDS
from tests.harness.paths import ROOT

PACKAGE = ROOT / "rmcore"
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))

# --- what a folder may import ----------------------------------------------------------------------------------------
# From the bottom to the top. A folder is one stage that the data pass, and imports only what stands before it here.
LAYERS = (
    *("host", "config", "ops"),
    *("data", "model", "parallel", "cost"),
    *("evaluation", "tracking", "report", "scoring", "testing"),
    *("checkpoint", "serving", "hf_export", "training"),
    *("commands", "bench"),
)
# The stages inside rmcore/data/, likewise; its own files (prepare.py, pipeline.py) put them together.
DATA_LAYERS = (
    "drop_reasons",
    "labels",
    "synthetic",
    "sandbox",
    "formats",
    "reading",
    "tokens",
    "batches",
    "inspection",
)
# What can be run lies in the root of the package, and nothing else.
COMMANDS = {*(MODULES_OF_COMMANDS.get(name, name) for name in COMMANDS_OF_THE_CONSOLE), "__main__"} - {"bench"}
# Folders whose modules must be importable with these libraries alone: `--help` must not wait for torch.
LIGHT = {"config": {"pydantic", "pydantic_core", "annotated_types", "yaml", "rich"}}


def module_name(path: str) -> str:
    """rmcore/data/prepare.py -> rmcore.data.prepare; rmcore/data/__init__.py -> rmcore.data."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


KNOWN = {module_name(path) for path in MODULES}


def imports(source: str, module: str) -> set[str]:
    """Every module that the source imports, anywhere in it, as absolute names.

    Except what the package itself imports for type checkers: rmcore/__init__.py exports names of the layers above. It
    imports them when they are first used (PEP 562), when every module may import the package.
    """
    found: set[str] = set()
    tree = ast.parse(source)
    if module == "rmcore":
        for node in tree.body:
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: from the package that holds the module
                parts = module.split(".")[: -node.level]
                base = ".".join([*parts, base]).rstrip(".")
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in KNOWN else base for name in names}
    return found


def height(module: str) -> tuple[int, int]:
    """Where a module stands: the number of its layer, and within rmcore/data/ that of its stage."""
    _, folder, *inside = module.split(".")
    if folder not in LAYERS:
        return LAYERS.index("commands"), 0
    if folder == "data":
        return LAYERS.index("data"), DATA_LAYERS.index(inside[0]) if inside and inside[0] in DATA_LAYERS else 99
    return LAYERS.index(folder), 0


def direction_complaints(source: str, module: str) -> list[str]:
    """Imports of what stands higher, imports of one command by another, and heavy libraries in light folders."""
    complaints = []
    # The package itself imports nothing but the check that must come before every library.
    own = {"rmcore", module} | ({"rmcore.host.start"} if module == "rmcore" else set())
    for name in sorted(imports(source, module) - own):
        library = name.split(".")[0]
        if library == "rmcore":
            commands = LAYERS.index("commands")
            between_commands = module != "rmcore" and height(name)[0] == height(module)[0] == commands
            if module == "rmcore" or height(name) > height(module) or between_commands:
                complaints.append(f"{module} imports {name}")
        elif library not in sys.stdlib_module_names and library not in LIGHT.get(module.split(".")[1:2][0], {library}):
            complaints.append(f"{module} imports {name}")
    return complaints


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one found; none is the law."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


# --- what no file may do ---------------------------------------------------------------------------------------------
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_MODULES |= {"accelerate", "deepspeed", "torchdata", "hydra"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    "torch": {"load", "save"},
    "yaml": {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"},
    "os": {"system", "popen"},
    "*": {
        "all_gather_object",
        "gather_object",
        "broadcast_object_list",
        "scatter_object_list",
        "send_object_list",
        "recv_object_list",
    },
}
FORBIDDEN_ARGUMENTS = {"allow_pickle", "shell"}  # with the value True


def danger_complaints(source: str, module: str) -> list[str]:
    """Pickle in any disguise, code made of text, shells, and the trainers that rmcore does without."""
    complaints = []
    nodes = list(ast.walk(ast.parse(source)))
    # torch.load(..., weights_only=True) reads tensors and runs no code.
    harmless = {id(node.func) for node in nodes if isinstance(node, ast.Call) and _reads_weights_only(node)}
    for node in nodes:
        if id(node) in harmless:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            inner = {alias.name for alias in node.names}
            banned = FORBIDDEN_ATTRIBUTES.get(base, set()) | FORBIDDEN_ATTRIBUTES["*"]
            names = sorted(inner & banned) + [base] * (base.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in FORBIDDEN_ATTRIBUTES.get(owner, set()) | FORBIDDEN_ATTRIBUTES["*"]:
                names = [f"{owner}.{node.attr}"]
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                names = [node.func.id]
            for keyword in node.keywords:
                if keyword.arg in FORBIDDEN_ARGUMENTS and getattr(keyword.value, "value", None) is not False:
                    names.append(f"{keyword.arg}=")
        complaints += [f"{module}:{getattr(node, 'lineno', 0)} uses {name}" for name in names]
    return complaints


def _reads_weights_only(call: ast.Call) -> bool:
    wanted = [k.value for k in call.keywords if k.arg == "weights_only"]
    literal = bool(wanted) and isinstance(wanted[0], ast.Constant) and wanted[0].value is True
    return literal and ast.unparse(call.func) == "torch.load"


# --- the shape of a file ---------------------------------------------------------------------------------------------
# A NotImplementedError that says what is not there is a refusal; a bare one is a stub.
UNFINISHED = re.compile(r"\b(NotImplementedError(?! ?\()|TODO|FIXME|XXX)\b")


def unfinished_complaints(source: str, path: str) -> list[str]:
    """Stubs, and work left to a reader."""
    return [f"{path} has {match.group()}" for match in UNFINISHED.finditer(source)]


def docstring_complaints(source: str, path: str) -> list[str]:
    """A module opens with what it is: at least a sentence."""
    text = ast.get_docstring(ast.parse(source)) or ""
    return [] if len(text.split()) >= 5 else [f"{path} does not open with a docstring that says what it is"]


def print_complaints(source: str, path: str) -> list[str]:
    """Messages may contain names and texts of strangers, so they are printed by host/terminal.py, which cleans them."""
    if path == "rmcore/host/terminal.py" or path.startswith("rmcore/bench/"):
        return []
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [
        f"{path}:{call.lineno} prints without print_text"
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]


Law = Callable[[str, str], list[str]]


def broken(law: Law, by_name: bool = False) -> list[str]:
    """Every complaint of a law over the package."""
    found: list[str] = []
    for path in MODULES:
        found += law((ROOT / path).read_text(encoding="utf-8"), module_name(path) if by_name else path)
    return found


def root_complaints(package: Path) -> list[str]:
    """What lies in the root of the package and is neither a command nor a layer, and what is missing there."""
    files = {path.stem for path in package.glob("*.py")} - {"__init__"}
    folders = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    expected = {*LAYERS, "csrc", "inspect"} - {"commands"}  # inspect: the command of a name that no file may have
    return sorted(f"{name}.py" for name in files ^ COMMANDS) + sorted(f"{name}/" for name in folders ^ expected)


def test_the_root_of_the_package_holds_commands_and_layers_only() -> None:
    assert root_complaints(PACKAGE) == []


def test_a_stray_file_or_folder_in_the_root_is_seen(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "rmcore", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tmp_path / "rmcore" / "assembly.py").touch()
    (tmp_path / "rmcore" / "common").mkdir()
    (tmp_path / "rmcore" / "push.py").unlink()
    assert root_complaints(tmp_path / "rmcore") == ["assembly.py", "push.py", "common/"]


def test_imports_point_one_way() -> None:
    assert broken(direction_complaints, by_name=True) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rmcore", "import rmcore.config"),
        ("rmcore", "if TYPE_CHECKING:\n    import rmcore.config\nelse:\n    import rmcore.data.prepare"),
        ("rmcore.ops.pairwise", "if TYPE_CHECKING:\n    from rmcore.model import backbone"),
        ("rmcore.config", "import torch"),
        ("rmcore.config.help", "def f():\n    from transformers import AutoConfig"),
        ("rmcore.config.load", "from rmcore.data.prepare import prepare_data"),
        ("rmcore.data.formats.fields", "from rmcore.data.tokens import cache"),
        ("rmcore.data.tokens.cache", "from ..batches.batch import RaggedBatch"),
        ("rmcore.data.reading.sources", "from rmcore.model import backbone"),
        ("rmcore.ops.pairwise", "from ..model.attention import x"),
        ("rmcore.model.pruning", "from rmcore.parallel.ddp import DataParallel"),
        ("rmcore.parallel.ddp", "from ..training.metrics import Metrics"),
        ("rmcore.evaluation.evaluate", "from rmcore import train"),
        ("rmcore.checkpoint.resume", "import rmcore.training.saver"),
        ("rmcore.evaluation.evaluate", "from rmcore.evaluate import main"),
        ("rmcore.score", "import rmcore.train"),
        ("rmcore.train", "from rmcore.bench.measure import machine"),
    ],
)
def test_a_wrong_import_is_seen(module: str, source: str) -> None:
    assert direction_complaints(source, module)


def test_a_right_import_passes() -> None:
    source = "import os, torch\nfrom rmcore.config import UserError\nfrom rmcore.ops.pairwise import pairwise_loss"
    assert direction_complaints(source, "rmcore.model.reward_model") == []


def test_no_modules_import_each_other() -> None:
    sources = {module_name(path): (ROOT / path).read_text(encoding="utf-8") for path in MODULES}
    assert circle({name: imports(source, name) - {name} for name, source in sources.items()}) == []


def test_a_circle_is_seen() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_everything_is_printed_by_the_function_that_cleans_it() -> None:
    assert broken(print_complaints) == []
    assert print_complaints("def f():\n    print('x')", "rmcore/train.py") == [
        "rmcore/train.py:2 prints without print_text"
    ]


def test_no_pickle_and_no_code_from_text() -> None:
    assert broken(danger_complaints) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load",
        "load = torch.save",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "eval('1')",
        "exec(text)",
        "import torch.distributed as dist\ndist.all_gather_object(a, b)",
        "from torch.distributed import broadcast_object_list",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=flag)",
        "import accelerate",
    ],
)
def test_a_forbidden_call_is_seen(source: str) -> None:
    assert danger_complaints(source, "planted")


def test_harmless_look_alikes_pass() -> None:
    source = "model.eval()\nyaml.safe_load(text)\nnp.load(path, allow_pickle=False)\nre.compile(x)\njson.load(file)"
    source += "\ntorch.load(path, weights_only=True)"
    assert danger_complaints(source, "planted") == []


def test_every_module_opens_with_a_docstring() -> None:
    assert broken(docstring_complaints) == []
    assert docstring_complaints("import os", "planted")


def test_nothing_is_a_stub() -> None:
    assert broken(unfinished_complaints) == []
    assert unfinished_complaints("raise NotImplementedError\n", "planted")
    assert not unfinished_complaints("raise NotImplementedError('no second derivative')", "planted")


# --- importing does nothing ------------------------------------------------------------------------------------------
# What a library changes when it is first imported (environment, warnings' filters) is its own affair, so these two are
# looked for in the source; the rest is looked at while every module is imported.
SETTERS = re.compile(
    r"(os\.environ\.(setdefault|update|pop)|os\.putenv|warnings\.(filterwarnings|simplefilter)|logging\.basicConfig"
    r"|signal\.signal|random\.seed|manual_seed|torch\.set_\w+|\.set_verbosity\w*|print)$"
)


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node that runs when the module is imported: not the bodies of functions, nor the main part."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def side_effect_complaints(source: str, path: str) -> list[str]:
    """Settings of the process that are changed by importing."""
    complaints = []
    for node in at_import(ast.parse(source)):
        if isinstance(node, ast.Call) and SETTERS.search(ast.unparse(node.func)):
            complaints.append(f"{path}:{node.lineno} calls {ast.unparse(node.func)}")
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        complaints += [f"{path} changes {ast.unparse(t)}" for t in targets if ast.unparse(t).startswith("os.environ[")]
    return complaints


@pytest.mark.parametrize("source", ["os.environ['A'] = '1'", "torch.set_num_threads(1)", "if x:\n    print(1)"])
def test_a_side_effect_is_seen(source: str) -> None:
    assert side_effect_complaints(source, "planted")
    inside = "def f():\n" + "".join(f"    {line}\n" for line in source.splitlines())
    assert side_effect_complaints(inside, "planted") == []


IMPORT_EVERYTHING = """
import importlib, logging, os, signal, sys, threading
import torch

def state():
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    return dict(dtype=torch.get_default_dtype(), handlers=handlers, random=torch.random.get_rng_state().tolist(),
                tf32=torch.get_float32_matmul_precision(), deterministic=torch.are_deterministic_algorithms_enabled(),
                threads=torch.get_num_threads(), python_threads=threading.active_count(),
                root=logging.getLogger().handlers[:], hook=sys.excepthook, directory=os.getcwd())

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
    after = state()
    changed = [key for key in before if before[key] != after[key]]
    if changed:
        sys.exit(f"importing {name} changes {changed}")
"""
# Modules of an extra or of a machine: importing them needs what is not everywhere.
NOT_EVERYWHERE = {"rmcore.ops.pairwise_triton", "rmcore.ops.gather_prefix_triton"}


def test_importing_has_no_side_effects() -> None:
    assert broken(side_effect_complaints) == []
    names = [name for name in map(module_name, MODULES) if name not in NOT_EVERYWHERE and not name.endswith("__main__")]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_EVERYTHING, *names],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout == "", "importing prints"


def test_the_configuration_does_not_wait_for_torch() -> None:
    code = (
        "import sys, rmcore, rmcore.config\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True, timeout=60)
    assert output.strip() == "[]"


# --- what lies where -------------------------------------------------------------------------------------------------
TOP_LEVEL = {"rmcore", "configs", "launch", "tests", ".ci"}
TOP_LEVEL |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "constraints.txt", "MANIFEST.in", ".gitignore"}
TOP_LEVEL |= {"README.md", "LICENSE", "CHANGELOG.md"}


def tracked() -> list[str]:
    """The files that git tracks; a test that needs them skips where there is no git checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: which files belong to the project is git's knowledge")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_the_top_level_holds_only_what_was_agreed() -> None:
    assert sorted({name.split("/")[0] for name in tracked()} - TOP_LEVEL) == []


def test_no_room_is_called_utils() -> None:
    assert [path for path in MODULES if Path(path).stem in {"utils", "util", "helpers", "common", "misc"}] == []


# What a file of the project may not name: a path of someone's machine; and, at run time, data beside the checkout.
MACHINE_PATH = re.compile(r"(?<![\w.$}~/*-])/(?:work|root|home)/\w")
BESIDE = "../" + "shared"


def text_complaints(text: str, path: str) -> list[str]:
    """Paths that hold on one machine only."""
    complaints = [f"{path} names {match.group()}..." for match in MACHINE_PATH.finditer(text)]
    if path.split("/")[0] in {"rmcore", "configs", "launch"} and BESIDE in text:
        complaints.append(f"{path} names {BESIDE}: nothing at run time may need it")
    return complaints


def test_no_file_names_a_path_of_one_machine() -> None:
    complaints: list[str] = []
    for name in tracked():
        try:
            complaints += text_complaints((ROOT / name).read_text(encoding="utf-8"), name)
        except UnicodeDecodeError:
            continue  # a picture, say
    assert complaints == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("README.md", "see /" + "work/main"),
        ("rmcore/x.py", f"'{BESIDE}/data'"),
        ("configs/x.yaml", "path: /" + "home/me"),
    ],
)
def test_a_path_of_one_machine_is_seen(path: str, text: str) -> None:
    assert text_complaints(text, path)
    assert not text_complaints("https://example.org/home/me ~/work/x $HOME/work/x", path)


SCRIPTS = sorted(path for folder in ("launch", ".ci") for path in (ROOT / folder).rglob("*") if path.is_file())
SHELL_SCRIPTS = [path for path in SCRIPTS if re.match(r"#!.*\b(ba)?sh\b", path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_shell_scripts_are_sound(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert re.search(r"^set -euo pipefail$", text, re.MULTILINE), "stops at the first error"
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        result = subprocess.run(["shellcheck", "-x", str(script)], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout


def test_the_two_commands_are_there() -> None:
    assert {"quickstart.sh", "test.sh", "run"} <= {path.name for path in SHELL_SCRIPTS}


# --- versions --------------------------------------------------------------------------------------------------------
def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_changelog_opens_with_the_version() -> None:
    versions = re.findall(r"^## \[?(\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == rmcore.__version__


def test_every_requirement_has_a_tested_version() -> None:
    """What is installed by default and for development is pinned in constraints.txt, and by exact versions alone."""
    pins: set[str] = set()
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([\w-]+)==[\w.]+(; python_version >= \"3\.11\")?", line)
            assert match, f"not an exact version: {line}"
            pins.add(canonical(match.group(1)))
    try:
        requirements = importlib.metadata.requires("rmcore") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("rmcore is not installed (bash launch/setup.sh installs it)")
    needed = {r for r in requirements if "extra ==" not in r or re.search(r"extra == ['\"](dev|lora)['\"]", r)}
    names = {canonical(re.match(r"[\w.-]+", r).group()) for r in needed}  # type: ignore[union-attr]
    assert {"torch", "transformers", "pytest"} <= names
    # A CUDA build of torch asks for one exact triton of its own, which a pin here would contradict.
    assert sorted(names - pins - {"triton"}) == []
