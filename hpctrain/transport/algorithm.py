"""Makes Open MPI run big all-reduces as a ring, unless the site decided otherwise.

Open MPI's own choice at these sizes is not a ring between nodes and costs up to 1.8 times the
link's limit (docs/operations.md). Its `tuned` component reads a file of rules when MPI starts:
from `RING_FROM_BYTES` on the ring runs, below it the library decides as always. In Open MPI 5 the
hierarchical component `han` would keep the all-reduce between nodes away from `tuned`, so it gets
a file of rules too, which hands big all-reduces of the whole communicator on to `tuned`. Where
Open MPI 4 launches a program of Open MPI 5 (an image on a host that is older), `han` hangs in the
first collective between nodes, so there it is switched off.

Over TCP, Open MPI asks the receiver before it sends more than 64 KiB, and the answer waits behind
whatever else leaves that node: milliseconds per ring step on a loaded link. Ring steps of up to
`EAGER_BYTES` are therefore sent at once. Fabrics other than TCP have limits of their own.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

RING_FROM_BYTES = 1 << 20
EAGER_BYTES = 2 << 20
_HEADER_BYTES = 4096
_ORTE = "OMPI_MCA_orte_"
"""What the mpirun of Open MPI 4 sets for its ranks, and that of 5 does not."""


@dataclass(frozen=True)
class Choice:
    """What to tell Open MPI before it starts, and what to tell people."""

    files: dict[str, str]
    """Variable -> text of the file that it must name."""
    variables: dict[str, str]
    """Further environment variables."""
    report: str
    """Which all-reduce runs, for people."""


def tuned_rules(ring_from_bytes: int = RING_FROM_BYTES) -> str:
    """Text of a rules file for Open MPI's `coll/tuned` (read alike by 4.x and 5.0). Local.

    Algorithm 0 leaves a size to the library's decision; 4 is the ring.
    """
    return "\n".join(
        (
            "1  # one collective",
            "2  # all-reduce",
            "1  # one rule by number of ranks",
            "2  # from 2 ranks on",
            "2  # two rules by message size",
            "0 0 0 0  # from 0 bytes: the library's decision",
            f"{ring_from_bytes} 4 0 0  # ring, no fan-out, no segments",
            "",
        )
    )


def han_rules(ring_from_bytes: int = RING_FROM_BYTES) -> str:
    """Text of a rules file for Open MPI 5's `coll/han`: big all-reduces go to `tuned`. Local."""
    return "\n".join(
        (
            "1  # one collective",
            "allreduce",
            "1  # one topologic level",
            "2  # the whole communicator",
            "1  # one rule by number of nodes or ranks",
            "1  # from 1 on",
            "2  # two rules by message size",
            "0 han  # from 0 bytes: as without this file",
            f"{ring_from_bytes} tuned",
            "",
        )
    )


def choose(library: str, environ: Mapping[str, str], configuration: Sequence[Path]) -> Choice:
    """Decide from the library's version text and what the site set. Local.

    Args:
        library: MPI_Get_library_version's text.
        environ: The environment in which MPI will start.
        configuration: Open MPI's parameter files, see `configuration_files`.
    """
    version = re.search(r"Open MPI v?(\d+)\.(\d+)", library)
    if version is None:
        return Choice({}, {}, _describe_other(library, environ))
    title = f"Open MPI {version[1]}.{version[2]}"
    if int(version[1]) not in (4, 5):
        return Choice({}, {}, f"library default ({title})")
    # hpctrain's windows live in shared memory; where UCX does not work, Open MPI 5 prints an error
    # for each of them although nothing is wrong.
    quiet = {"OMPI_MCA_osc": "^ucx"} if version[1] == "5" and "OMPI_MCA_osc" not in environ else {}
    others = quiet | _eager(environ, configuration)
    set_by_site = sorted(name for name in environ if name.startswith("OMPI_MCA_coll"))
    if set_by_site:
        shown = ", ".join(f"{name}={environ[name]}" for name in set_by_site)
        return Choice({}, others, f"as the site set it ({title}: {shown})")
    for path in configuration:
        if line := _line_about("coll", path):
            return Choice({}, others, f"as the site set it ({title}: {line} in {path})")
    files = {"OMPI_MCA_coll_tuned_dynamic_rules_filename": tuned_rules()}
    variables = {"OMPI_MCA_coll_tuned_use_dynamic_rules": "1"} | others
    if version[1] == "5" and any(name.startswith(_ORTE) for name in environ):
        variables["OMPI_MCA_coll_han_priority"] = "0"
    elif version[1] == "5":
        files["OMPI_MCA_coll_han_dynamic_rules_filename"] = han_rules()
        variables["OMPI_MCA_coll_han_use_dynamic_file_rules"] = "1"
    return Choice(
        files,
        variables,
        f"ring from {RING_FROM_BYTES >> 20} MiB on, library default below ({title} tuned)",
    )


@contextmanager
def applied(choice: Choice) -> Iterator[None]:
    """Set the choice while MPI starts inside the block, then take it back. Local.

    Open MPI reads its parameters and the files once, in MPI_Init; afterwards nothing remains, in
    particular not in the environment of child processes.
    """
    with tempfile.TemporaryDirectory(prefix="hpctrain-mpi-") as folder:
        variables = dict(choice.variables)
        for number, (name, text) in enumerate(choice.files.items()):
            path = Path(folder) / f"rules-{number}.conf"
            path.write_text(text, encoding="ascii")
            variables[name] = str(path)
        os.environ.update(variables)
        try:
            yield
        finally:
            for name in variables:
                os.environ.pop(name, None)


def configuration_files(environ: Mapping[str, str], library_path: Path | None) -> list[Path]:
    """Open MPI's parameter files that exist here. Local.

    Args:
        environ: HOME, OPAL_PREFIX and the variables that name further files are read from it.
        library_path: The libmpi that is loaded, see `loaded_library`.
    """
    paths = [Path(environ.get("HOME", "/root")) / ".openmpi" / "mca-params.conf"]
    prefixes = [Path(environ["OPAL_PREFIX"])] if "OPAL_PREFIX" in environ else []
    if library_path is not None:
        prefixes += list(library_path.parents)[1:5]
    for prefix in prefixes:
        for name in ("openmpi-mca-params.conf", "openmpi-mca-params-override.conf"):
            paths += [prefix / "etc" / name, prefix / "etc" / "openmpi" / name]
    for variable in (
        "OMPI_MCA_mca_base_param_files",
        "OMPI_MCA_mca_param_files",
        "OMPI_MCA_mca_base_override_param_file",
    ):
        paths += [Path(part) for part in re.split("[,:]", environ.get(variable, "")) if part]
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def loaded_library() -> Path | None:
    """The libmpi that this process has loaded, None where /proc does not say. Local."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"(/\S*/libmpi\.so\S*)", maps)
    return Path(found[1]) if found else None


def _eager(environ: Mapping[str, str], configuration: Sequence[Path]) -> dict[str, str]:
    """Variables that let ring steps go at once over TCP, unless the site tuned its TCP."""
    names = [f"OMPI_MCA_btl_tcp_{name}" for name in ("eager_limit", "max_send_size")]
    if any(name in environ for name in names):
        return {}
    if any(_line_about("btl_tcp_(eager_limit|max_send_size)", path) for path in configuration):
        return {}
    return dict.fromkeys(names, str(EAGER_BYTES + _HEADER_BYTES))


def _line_about(parameter: str, path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pattern = rf"\s*{parameter}(_\w+)?\s*="
    return next((line.strip() for line in lines if re.match(pattern, line)), "")


def _describe_other(library: str, environ: Mapping[str, str]) -> str:
    title = library.strip().splitlines()[0].strip() if library.strip() else "unknown MPI"
    for name in ("MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM", "I_MPI_ADJUST_ALLREDUCE"):
        if name in environ:
            return f"{name}={environ[name]} ({title})"
    return f"library default ({title})"
