"""The ordinary user who builds and runs images: this one, or one made for it when this is root.

`apptainer build` maps an ordinary user to root inside the image through /etc/subuid; as root itself
it needs capabilities that a sandbox may not have.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.images.install import InstallError, run

NAME = os.environ.get("HPCTRAIN_IMAGE_USER", "hpctrain-lab")


def builder() -> pwd.struct_passwd:
    """The user; made first, with ranges of subordinate ids, when this is root.

    Raises:
        InstallError: this user has no such ranges.
    """
    if os.geteuid() == 0:
        try:
            user = pwd.getpwnam(NAME)
        except KeyError:
            run(["useradd", "--create-home", "--shell", "/bin/bash", NAME])
            user = pwd.getpwnam(NAME)
    else:
        user = pwd.getpwuid(os.geteuid())
    for table, option in (("/etc/subuid", "--add-subuids"), ("/etc/subgid", "--add-subgids")):
        if _has_range(Path(table), user):
            continue
        if os.geteuid() != 0:
            raise InstallError(
                f"{user.pw_name} has no range in {table}: ask an administrator for "
                f"usermod {option} FIRST-LAST {user.pw_name}"
            )
        first = 100_000 + 65_536 * (user.pw_uid - 1000)
        run(["usermod", option, f"{first}-{first + 65_535}", user.pw_name])
    return user


def as_builder(command: Sequence[str | Path]) -> list[str]:
    """Words that run `command` as that user, with the user's own HOME and a clean environment."""
    user = builder()
    path = os.environ.get("PATH", os.defpath)
    clean = ["env", "-i", f"HOME={user.pw_dir}", f"USER={user.pw_name}", f"PATH={path}"]
    words = [*clean, *(str(word) for word in command)]
    return ["runuser", "-u", user.pw_name, "--", *words] if os.geteuid() == 0 else words


def _has_range(table: Path, user: pwd.struct_passwd) -> bool:
    owners = {line.split(":")[0] for line in table.read_text().splitlines() if ":" in line}
    return bool(owners & {user.pw_name, str(user.pw_uid)})
