"""docs/architecture.md holds: who imports whom, how long files are, what a command may load."""

from __future__ import annotations

import ast
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpctrain.runs.status import Status

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hpctrain"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = [
    {"__main__", "__init__"},
    {"cli"},
    {"commands"},
    {"api", "drop_in"},
    {"launch", "doctor", "appraisal", "calibrate"},
    {"train", "assemble"},
    {"session", "reconcile"},
    {"batch_control"},
    {"measurement"},
    {"meter"},
    {"config", "journal", "hardware", "place", "views", "timing"},
    {"exchange", "sync", "batch", "regularise", "runs", "agreement", "census"},
    {"sketches", "throttle", "forms"},
    {
        "compress",
        "stats",
        "data",
        "models",
        "optimiser",
        "replicas",
        "clock",
        "control",
        "randomness",
        "config_errors",
    },
    {"transport", "settings", "toml_text", "user_code"},
    {"errors", "state", "table"},
]
"""Top to bottom. A room (folder) or module imports from lower lines only, and from itself."""

SIDEWAYS = {("models", "data.spec"), ("optimiser", "models.flat")}
"""What one line shares: the shape of samples, and the flat view of parameters."""

METHOD_TRANSPORT = {"transport.communicator", "transport.topology"}
"""What exchange, sync, batch and everything below see of the transport."""
RUN_TRANSPORT = {
    "transport.abort",
    "transport.launcher",
    "transport.levels",
    "transport.numa",
    "transport.watchdog",
}
"""What the modules of a run see besides; none of these loads MPI."""
PICKS_TRANSPORT = {"api", "drop_in", "hardware", "doctor"}
"""Who chooses between threads, mpi, hvd and nccl, or examines them."""

METHOD_ROOMS = {"exchange", "sync", "batch", "regularise"}


@dataclass(frozen=True)
class Import:
    file: Path
    line: int
    text: str
    target: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.text}"


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(file: Path) -> Iterator[Import]:
    """Every import, also inside functions and under TYPE_CHECKING."""
    source = file.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            full = [f"{base}.{alias.name}" for alias in node.names]
            targets = [name if is_module(name) else base for name in full]
        else:
            continue
        for target in targets:
            yield Import(file, node.lineno, ast.get_source_segment(source, node) or "", target)


ALL_IMPORTS = [found for file in FILES for found in imports(file)]


def room_of(file: Path) -> str:
    first = file.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def layer_of(room: str) -> int:
    found = [number for number, layer in enumerate(LAYERS) if room in layer]
    assert found, f"hpctrain/{room} stands in no layer: add it to LAYERS in {Path(__file__).name}"
    return found[0]


def fault_of(found: Import) -> str | None:
    """Why this import goes up, sideways or into the transport; None if it does not."""
    if found.target.startswith("."):
        return "relative import; write the full name"
    top, _, inner = found.target.partition(".")
    if top != "hpctrain":
        return None
    room = room_of(found.file)
    if not inner:
        version = found.text in ("import hpctrain", "from hpctrain import __version__")
        return None if version else "takes from the package what only its users may"
    other = inner.split(".")[0]
    if other == room or (room, inner) in SIDEWAYS:
        return None
    if layer_of(other) <= layer_of(room):
        return f"{room} must not import {other}: imports go down (LAYERS in {Path(__file__).name})"
    if other == "transport" and room not in PICKS_TRANSPORT:
        methods_see = layer_of(room) >= layer_of("exchange")
        allowed = METHOD_TRANSPORT if methods_see else METHOD_TRANSPORT | RUN_TRANSPORT
        if inner not in allowed:
            return f"{room} sees only {', '.join(sorted(allowed))} of the transport"
    return None


def test_imports_go_down():
    faults = [f"{found}\n    {fault}" for found in ALL_IMPORTS if (fault := fault_of(found))]
    assert not faults, "\n".join(["", *faults])


@pytest.mark.parametrize(
    ("file", "target"),
    [
        ("errors.py", "hpctrain.cli"),
        ("data/idx.py", "hpctrain.models.cnn"),
        ("models/cnn.py", "hpctrain.data.loader"),
        ("exchange/dense.py", "hpctrain.transport.mpi"),
        ("exchange/dense.py", "hpctrain.batch"),
        ("exchange/dense.py", ".buckets"),
        ("train.py", "hpctrain.transport.hvd"),
        ("runs/record.py", "hpctrain"),
    ],
)
def test_a_wrong_import_is_seen(file, target):
    assert fault_of(Import(PACKAGE / file, 1, f"from {target} import anything", target))


def test_only_the_transport_knows_mpi4py_and_horovod():
    allowed = {"mpi4py": ("mpi.py", "mpi_", "hvd.py"), "horovod": ("hvd.py",)}
    faults = []
    for found in ALL_IMPORTS:
        library = found.target.split(".")[0]
        if library in allowed:
            home = found.file.parent == PACKAGE / "transport"
            if not (home and found.file.name.startswith(allowed[library])):
                faults.append(f"{found}\n    only transport/{allowed[library]} import {library}")
    assert not faults, "\n".join(["", *faults])
    assert any(found.target.startswith("mpi4py") for found in ALL_IMPORTS)
    assert any(found.target.startswith("horovod") for found in ALL_IMPORTS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_are_short(file):
    method = file.parent.name in METHOD_ROOMS and file.name != "__init__.py"
    limit = 200 if method else 299
    lines = len(file.read_text().splitlines())
    assert lines <= limit, f"{lines} lines, at most {limit}: one thing per file, split it"


def test_an_installation_has_every_room():
    with open(ROOT / "pyproject.toml", "rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    rooms = {".".join(file.parent.relative_to(ROOT).parts) for file in FILES}
    assert set(setuptools["packages"]) == rooms | set(setuptools["package-dir"])


def test_no_room_of_leftovers():
    words = {"utils", "util", "helpers", "common", "misc"}
    assert not [file for file in FILES if words & {file.stem, file.parent.name}]


def test_the_loop_does_not_know_methods_by_name():
    """Rule 1: what a run chose is decided where things are assembled, never inside the loop."""
    for node in ast.walk(ast.parse((PACKAGE / "train.py").read_text())):
        if isinstance(node, ast.Compare):
            names = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
            assert "kind" not in names, f"train.py:{node.lineno} asks for a kind"


PROBE = """
import json, sys
from hpctrain.cli import run_command_line
sys.argv = ["hpctrain", *sys.argv[1:]]
try:
    code = run_command_line(sys.argv[1:])
except SystemExit as leaving:
    code = leaving.code
loaded = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps({"code": code or 0, "loaded": loaded}), file=sys.stderr)
"""


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run, as far as `status`, `stop` and `logs` look."""
    status = Status(
        state="complete",
        step=10,
        samples=960,
        epoch=1.0,
        attempt=1,
        exit_code=0,
        pid=1,
        pid_start=1,
        host=socket.gethostname(),
        job_id=None,
        updated_s=time.time(),
    )
    (tmp_path / "status.json").write_text(status.to_json())
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank-00000.log").write_text("a line\n")
    return tmp_path


def loaded_by(*arguments: str) -> tuple[int, set[str]]:
    """Exit code and top-level modules loaded by one command, started as from a shell."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stderr.splitlines()[-1])
    return answer["code"], set(answer["loaded"])


@pytest.mark.parametrize(
    "command",
    ["--help", "train --help", "diversity --help", "--version", "check", "config", "schema"],
)
def test_commands_of_a_login_node_load_no_mpi(command):
    code, loaded = loaded_by(*command.split())
    assert code == 0
    assert not loaded & {"mpi4py", "horovod"}
    if command.startswith(("--", "train", "diversity")):
        assert not loaded & {"torch", "numpy", "sklearn"}


@pytest.mark.parametrize(("command", "code"), [("status", 0), ("logs", 0), ("stop", 2)])
def test_commands_about_a_run_load_neither_mpi_nor_torch(command, code, run_folder):
    found, loaded = loaded_by(command, str(run_folder))
    assert found == code
    assert not loaded & {"mpi4py", "horovod", "torch"}


def test_importing_the_package_loads_neither_mpi_nor_torch():
    code = "import hpctrain, sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.split()) & {"mpi4py", "horovod", "torch"}
