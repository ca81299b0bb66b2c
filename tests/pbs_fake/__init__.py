"""A PBS that tests can submit to: qsub, qstat, qdel, qsig and qrerun on PATH, and one node list.

It refuses the directives that a real server refuses and behaves as OpenPBS 23.06 was measured to.
What was not measured but read in its sources or manual is marked "(source)" where it is written.
Jobs run one after the other, when `drain` is called.

    pbs = Pbs.create(tmp_path / "pbs", nodes={"node1": 4, "node2": 4})
    subprocess.run(["qsub", "job.sh"], env={**os.environ, **pbs.environment()})
    pbs.drain()                   # runs what can run, also what those jobs submit
    pbs.job("0.pbslab")["Exit_status"]
"""

from pbs_fake.server import Pbs

__all__ = ["Pbs"]
