"""hpctrain with its ranks as threads of one process: the arithmetic of a run under MPI.

    python -m benchmarks.peers.threads CONFIG --out FOLDER --ranks 4 [--per-node 2]

One rank computes at a time, so a run takes one core; on a machine
with fewer cores than ranks that is faster than processes which wait for each other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpctrain.api import run_on
from hpctrain.assemble import Options, World
from hpctrain.config import load
from hpctrain.errors import EXIT_COMPLETE, EXIT_STOPPED, NonFinite
from hpctrain.transport.threads import RankError, run_threads


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--out", type=Path, required=True, help="the run folder")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--per-node", type=int, default=1, help="ranks on each emulated node")
    args = parser.parse_args()
    loaded, options = load(args.config), Options(out=args.out)
    try:
        outcomes = run_threads(
            args.ranks,
            lambda comm: run_on(World(comm), loaded, options),
            node_of=[rank // args.per_node for rank in range(args.ranks)],
            only_waits=True,
        )
    except RankError as error:
        if not isinstance(error.__cause__, NonFinite):
            raise
        print(error.__cause__, file=sys.stderr)
        return NonFinite.exit_code
    return EXIT_COMPLETE if outcomes[0].complete else EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
