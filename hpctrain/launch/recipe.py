"""Where the definition files are, and the checkout that goes into an image."""

from __future__ import annotations

from pathlib import Path

from hpctrain.errors import UsageError
from hpctrain.launch.image import Family

DEFINITIONS: dict[Family, str] = {
    "openmpi": "containers/hpctrain.def",
    "mpich": "containers/hpctrain-mpich.def",
}
ARGUMENTS_CUDA = "containers/cuda.args"


def checkout(wanted: Path | None = None) -> Path:
    """The checkout to build from: `wanted`, else this hpctrain's own, else the working folder.

    An image holds what its definition copies from a checkout (the package, its pinned packages,
    the recipe of Horovod), and an installed package has none of these. Local.

    Raises:
        UsageError: the folder is no checkout, or there is none.
    """
    places = [wanted] if wanted else [Path(__file__).parents[2], Path.cwd()]
    for place in places:
        if all((place / name).is_file() for name in (*DEFINITIONS.values(), "pyproject.toml")):
            return place.absolute()
    raise UsageError(
        f"no checkout of hpctrain in {' or '.join(map(str, places))} (containers/hpctrain.def and "
        "pyproject.toml are looked for): clone its repository and build there, or name it with "
        "--source DIR."
    )
