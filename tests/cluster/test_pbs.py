"""The PBS script that `hpctrain submit` writes, run over four nodes.

The server is the fake one (tests/pbs_fake), which behaves as a real one was measured to; nodes,
mpirun and training are real.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pbs_fake import Pbs

from tests.cluster import launchers
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import ROOT, Site, last_step
from tests.recorded import losses

STEPS = 180
DRAIN = "import sys, pathlib, pbs_fake; pbs_fake.Pbs(pathlib.Path(sys.argv[1])).drain()"


def test_a_job_at_its_time_limit_is_continued_by_the_next(cluster: Cluster, tmp_path: Path) -> None:
    site = Site(tmp_path, None)
    pbs = Pbs.create(
        tmp_path / "pbs",
        nodes=dict.fromkeys(cluster.plan.names, 4),
        path=f"{Path(sys.executable).parent}:/usr/bin:/bin",
        agent=str(cluster.plan.path("agent")),
        variables=launchers.environment(cluster.plan),
    )
    config = site.config(STEPS, 0.3)
    variables = [f"--env={name}={value}" for name, value in site.environment.items()]
    options = ["--scheduler", "pbs", "--nodes", "4", "--time", "1m", *variables]
    submit = ["hpctrain", "submit", config, *options]
    cluster.on("head", submit, extra=pbs.environment(), cwd=tmp_path)
    assert [job["request"]["chunks"][0][0] for job in pbs.jobs()] == [4]
    drain = [sys.executable, "-c", DRAIN, str(pbs.root)]
    cluster.on("head", drain, extra={"PYTHONPATH": str(ROOT / "tests")}, cwd=tmp_path)

    run = tmp_path / "runs/job"
    text = "\n".join(path.read_text() for path in (tmp_path / "runs/job.job").iterdir())
    codes = [job["Exit_status"] for job in pbs.jobs()]
    assert codes[0] == 75, text
    assert codes[-1] == 0, text
    assert set(codes[:-1]) == {75}
    assert "4 ranks on 4 nodes (1+1+1+1)" in text
    assert last_step(run) == STEPS
    cluster.run(
        ["hpctrain", "train", site.config(STEPS), "--out", "whole"],
        ranks=4, per_node=1, cwd=tmp_path, extra=site.environment,
    )  # fmt: skip
    assert losses(run) == losses(tmp_path / "whole")
