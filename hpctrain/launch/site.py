"""Site profiles: what a job script has to know about one cluster, as TOML.

A profile is looked for by name in $HPCTRAIN_SITES, in ~/.config/hpctrain/sites, and among those
that come with hpctrain (jobs/sites in the repository); the first one found is taken.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, StringConstraints, ValidationError, model_validator

from hpctrain.config_errors import explain, nearest
from hpctrain.errors import ConfigError
from hpctrain.table import Table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
"""Names of environment variables that every shell can set."""
_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = (_PACKAGE / "sites", _PACKAGE.parent / "jobs" / "sites")
"""As installed, and in a checkout."""


def one_line(text: str) -> str:
    """The text, if it fits into one line of a script. Local.

    Raises:
        ValueError: it holds a line break or another control character.
    """
    if not text.isprintable():
        raise ValueError("must be one line without control characters")
    return text


Line = Annotated[str, AfterValidator(one_line)]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.,:=/@+-]*$")]
Variable = Annotated[str, StringConstraints(pattern=VARIABLE)]


class Site(Table):
    """One cluster. Only `scheduler` has no default."""

    title: Line = ""
    """What the profile is for; goes into the script's header."""
    scheduler: Literal["slurm", "pbs"]
    launcher: Literal["srun", "mpirun", "mpiexec"] = "mpirun"
    """srun: SLURM's; mpirun: that of the MPI library; mpiexec: Cray PALS under PBS."""
    mpi: Literal["openmpi", "mpich"] = "openmpi"
    """Family of the launcher and of the MPI library: libmpi.so.40 or libmpi.so.12."""
    srun_mpi: Word = "pmix"
    """Value of `srun --mpi`; "" for the site's default. `srun --mpi=list` shows what there is."""
    placement: list[Line] | None = None
    """Flags that place and bind the ranks, instead of the default ones of mpirun or mpiexec;
    {nodes}, {ranks}, {ranks_per_node} and {cpus_per_rank} are filled in."""
    launcher_flags: list[Line] = []
    """More flags of the launcher, as they are."""
    hosts: Literal["nodefile", "scheduler"] = "nodefile"
    """How mpirun under PBS learns the nodes: from a list made of $PBS_NODEFILE, or from PBS itself
    (an mpirun built with its tm interface)."""
    agent: Line = ""
    """Program with which Open MPI's mpirun reaches the nodes, e.g. "ssh"; "": as mpirun does."""
    gpu_request: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """SLURM: --gpus-per-node=N, or the older --gres=gpu:N."""
    chunk: list[Word] = []
    """PBS: more resources of each node in `select`, e.g. "system=polaris"."""
    place: Word = "scatter"
    """PBS: -l place."""
    direct_output: bool = True
    """PBS: -k oed, so that the log can be read while the job runs."""
    modules: list[Line] = []
    """Loaded with `module load`, in this order."""
    setup: list[Line] = []
    """Shell lines after the modules, as they are; they put hpctrain on PATH."""
    environment: dict[Variable, Line] = {}
    """Variables for all ranks, e.g. of the fabric. Quoted: nothing in a value is expanded."""
    directives: list[Line] = []
    """More directives, without #SBATCH or #PBS, as they are."""
    container: Literal["apptainer", "singularity"] = "apptainer"
    binds: list[Line] = []
    """Folders to show inside a container, each SRC[:DST[:OPTS]]."""
    container_flags: list[Line] = []
    """More flags of `apptainer exec`, as they are."""

    @model_validator(mode="after")
    def _combinations(self) -> Site:
        home = {"srun": "slurm", "mpiexec": "pbs"}.get(self.launcher, self.scheduler)
        if home != self.scheduler:
            raise ValueError(
                f'launcher = "{self.launcher}" belongs to scheduler = "{home}"; '
                f'with "{self.scheduler}" use "mpirun"'
            )
        if self.launcher == "mpiexec" and self.mpi != "mpich":
            raise ValueError('launcher = "mpiexec" (Cray PALS) starts mpi = "mpich"')
        return self


def load_site(name_or_path: str, environment: Mapping[str, str] = os.environ) -> Site:
    """Read a profile. Local.

    Args:
        name_or_path: A name, or the path of a file that ends with .toml.
        environment: where HPCTRAIN_SITES and HOME are looked up.

    Raises:
        ConfigError: no such profile (with the known ones), or a mistake in it.
    """
    if name_or_path.endswith(".toml"):
        return _read(Path(name_or_path))
    known = known_sites(environment)
    if name_or_path not in known:
        raise ConfigError(
            f"--site {name_or_path}: no such profile{nearest(name_or_path, sorted(known))}. Give "
            "one of these, the path of a .toml file, or put NAME.toml into $HPCTRAIN_SITES or "
            "~/.config/hpctrain/sites"
        )
    return _read(known[name_or_path])


def known_sites(environment: Mapping[str, str] = os.environ) -> dict[str, Path]:
    """Name -> file of all profiles that can be named. Local."""
    found: dict[str, Path] = {}
    for folder in _folders(environment):
        for path in sorted(folder.glob("*.toml")) if folder.is_dir() else ():
            found.setdefault(path.stem, path)
    return found


def _folders(environment: Mapping[str, str]) -> Iterator[Path]:
    if given := environment.get("HPCTRAIN_SITES"):
        yield Path(given)
    if home := environment.get("HOME"):
        yield Path(home) / ".config" / "hpctrain" / "sites"
    yield from _SHIPPED


def _read(path: Path) -> Site:
    try:
        tree: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    try:
        return Site.model_validate(tree)
    except ValidationError as error:
        lines = [explain(e, Site, tree, str(path), {}) for e in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None
