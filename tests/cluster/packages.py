"""Install what the virtual cluster and its SLURM need. On Debian and its kin, as root.

    python -m tests.cluster.packages

Does nothing where all is there. Containers: python -m tests.cluster.images.install
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from tests.cluster.cluster import missing
from tests.cluster.slurm import Slurm

PACKAGES = ("iproute2", "util-linux", "mount", "hostname", "slurm-wlm", "munge", "libpmix-dev")


def main() -> int:
    reasons = [reason for reason in (missing(), Slurm.missing()) if reason]
    if not reasons:
        return 0
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print("\n".join(f"tests.cluster: {reason}" for reason in reasons), file=sys.stderr)
        return 1
    print(f"tests.cluster: installing {', '.join(PACKAGES)}", file=sys.stderr)
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-q", *command],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"{done.stdout[-2000:]}{done.stderr[-2000:]}", file=sys.stderr)
            print(f"tests.cluster: apt-get {command[0]} failed", file=sys.stderr)
            return 1
    left = missing() or Slurm.missing()
    if left:
        print(f"tests.cluster: {left}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
