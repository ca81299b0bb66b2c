"""PBS: `hpctrain submit` and its scripts against a server that behaves as a real one did."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from job_fakes import Fakes
from pbs_fake import Pbs

from hpctrain.cli import run_command_line
from hpctrain.launch import pbs as pbs_scripts
from hpctrain.launch.job import Program

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "digits.toml")


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    return Fakes(tmp_path / "fakes")


@pytest.fixture
def pbs(tmp_path: Path, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> Pbs:
    """A server with two nodes, its commands on PATH, and an empty working folder."""
    server = Pbs.create(
        tmp_path / "pbs",
        nodes={"n1": 4, "n2": 4},
        path=f"{fakes.bin}:/usr/bin:/bin",
        variables={"FAKE": str(fakes.folder)},
        kill_delay_s=0.5,
    )
    monkeypatch.setenv("PATH", f"{server.root / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("hpctrain.launch.submit._COMMENT_AFTER_S", 0.0)
    monkeypatch.setattr("hpctrain.launch.job.this_program", lambda: Program())
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return server


@pytest.fixture
def submit(pbs, monkeypatch, capsys):
    """Run `hpctrain submit CONFIG --scheduler pbs ...`: exit code and stderr."""

    def run(*words: str) -> tuple[int, str]:
        words = ("submit", CONFIG, "--scheduler", "pbs", *words)
        monkeypatch.setattr(sys, "argv", ["hpctrain", *words])
        monkeypatch.setattr("hpctrain.cli._voices", (sys.stdout, sys.stderr))
        code = run_command_line(list(words))
        return code, capsys.readouterr().err

    return run


def command(*words: str, text: str = "") -> tuple[int, str]:
    """Exit code and all output of one of the server's commands."""
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def statuses(pbs: Pbs) -> list[int | None]:
    return [job["Exit_status"] for job in pbs.jobs()]


def test_a_run_is_continued_job_by_job_until_it_is_complete(pbs, fakes, submit):
    fakes.plan(75, 75, 0)
    assert submit("--nodes", "2", "--ranks-per-node", "2", "--cpus-per-rank", "2") == (0, "")
    pbs.drain()
    assert statuses(pbs) == [75, 75, 0]
    assert [job["state"] for job in pbs.jobs()] == ["F"] * 3, "nothing is left over"
    waited = [job["request"]["depend"] for job in pbs.jobs()]
    assert waited == [[], [["afternotok", "0.pbslab"]], [["afternotok", "1.pbslab"]]]
    assert fakes.starts == 3
    assert fakes.words("launcher")[:2] == ["-n", "4"]
    assert (fakes.folder / "hosts").read_text() == "n1 slots=2\nn2 slots=2\n"
    assert fakes.arguments(3)[:4] == ["train", CONFIG, "--out=runs/digits", "--resume=auto"]
    assert 3590 <= int(fakes.arguments(3)[4].removeprefix("--walltime=")) <= 3600
    assert fakes.environment()["OMP_NUM_THREADS"] == "2"
    assert Path("runs/digits").is_dir(), "not in $HOME, where PBS starts a job"
    logs = sorted(path.name for path in Path("runs/digits.job").glob("*.OU"))
    assert logs == ["0.pbslab.OU", "1.pbslab.OU", "2.pbslab.OU"]
    assert "attempt 3 ended with 0" in Path("runs/digits.job/2.pbslab.OU").read_text()


def test_attempts_have_an_end(pbs, fakes, submit):
    fakes.plan(75, 75, 75)
    submit("--max-attempts", "2")
    pbs.drain()
    assert statuses(pbs) == [75, 75]
    assert "2 attempts are over" in Path("runs/digits.job/1.pbslab.OU").read_text()


@pytest.mark.parametrize("step", ["stop:75", "78", "fresh:1"])
def test_no_continuation_where_none_is_wanted(step, pbs, fakes, submit):
    fakes.plan(step)
    submit()
    pbs.drain()
    assert len(pbs.jobs()) == 1


def test_killed_ranks_are_tried_again(pbs, fakes, submit):
    fakes.plan("kill", "kill", "kill", 0)
    submit()
    pbs.drain()
    assert statuses(pbs) == [137, 137, 137]


def test_qdel_ends_the_chain(pbs, fakes, submit):
    fakes.plan("qdel")
    submit()
    pbs.drain()
    assert statuses(pbs) == [271]


def test_each_task_of_an_array_continues_by_itself(pbs, fakes, submit):
    fakes.plan(0, 75, 0, 0)
    submit("--seeds", "3,5,9")
    pbs.drain()
    seeds = [fakes.arguments(start)[2] for start in range(1, 5)]
    assert seeds == ["--set=seed=3", "--set=seed=5", "--set=seed=9", "--set=seed=5"]
    tasks = {job["id"]: job["Exit_status"] for job in pbs.jobs() if "[]" not in job["id"]}
    assert tasks == {"0[0].pbslab": 0, "0[1].pbslab": 75, "0[2].pbslab": 0, "1[1].pbslab": 0}
    assert Path("runs/digits-seed-5").is_dir()


def test_a_job_that_can_never_run_is_deleted(pbs, submit):
    code, err = submit("--nodes", "3")
    assert code == 69
    assert "Can Never Run" in err
    assert "The job is deleted" in err
    assert statuses(pbs) == [271]


def test_what_qsub_says_is_passed_on(pbs, submit):
    code, err = submit("--directive=-l nonsense=1")
    assert code == 69
    assert "qsub ended with 187: qsub: Unknown resource: nonsense" in err
    assert pbs.jobs() == []


def test_a_comment_that_cannot_be_read_is_no_error():
    assert pbs_scripts.comment('{"Jobs": {"1.s": {"job_state": "Q"}}}') == ""
    for text in ("", "{}", "qstat: no"):
        with pytest.raises((ValueError, KeyError)):
            pbs_scripts.comment(text)


# What the server itself does, as it was measured on a real one.


def test_usr1_kills_the_login_shell_and_with_it_the_job(pbs):
    script = "trap 'echo asked' USR1\nqsig -s SIGUSR1 $PBS_JOBID\nsleep 20 & wait; sleep 20\n"
    assert command("qsub", "-j", "oe", text=script) == (0, "0.pbslab\n")
    pbs.drain()
    assert statuses(pbs) == [266]


def test_the_environment_of_a_job(pbs):
    script = (
        "#PBS -l select=2:ncpus=2:mpiprocs=2\n#PBS -l place=scatter\n#PBS -j oe\n#PBS -o out\n"
        "pwd; cat $PBS_NODEFILE; echo $PBS_O_WORKDIR $NCPUS ${SEEN-none}\n"
    )
    os.environ["SEEN"] = "not passed on"
    try:
        command("qsub", text=script)
    finally:
        del os.environ["SEEN"]
    pbs.drain()
    home, here = pbs.settings["home"], os.getcwd()
    assert Path("out").read_text() == f"{home}\nn1\nn1\nn2\nn2\n{here} 2 none\n"


def test_dependencies_after_75_and_after_0(pbs):
    command("qsub", text="exit 75\n")
    command("qsub", text="exit 0\n")
    assert command("qsub", "-W", "depend=afternotok:0.pbslab", text="exit 3\n")[0] == 0
    assert command("qsub", "-W", "depend=afternotok:1.pbslab", text="exit 4\n")[0] == 0
    pbs.drain()
    assert statuses(pbs) == [75, 0, 3, None]
    assert pbs.job("3")["state"] == "F"


def test_a_walltime_ends_a_job_and_a_user_cannot_rerun_one(pbs):
    command("qsub", "-l", "walltime=00:00:01", text="sleep 20\n")
    command("qsub", text="qrerun $PBS_JOBID; exit $?\n")
    pbs.drain()
    assert statuses(pbs) == [-29, 159]
    assert command("qstat", "-f", "-F", "json", "0")[0] == 35
    assert '"Exit_status": -29' in command("qstat", "-x", "-f", "-F", "json", "0")[1]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("-l select=2:ncpus=x", 166),
        ("-l select=2:ncpus", 166),
        ("-l select=0:ncpus=1", 166),
        ("-l select=1:gpus=1", 187),
        ("-l nodes=2", 187),
        ("-l walltime=4h", 166),
        ("-l place=everywhere", 166),
        ("-N 'two words'", 2),
        ("-N 7up", 2),
        ("-k oo", 2),
        ("-j yes", 2),
        ("-r maybe", 2),
        ("-q none", 170),
        ("-J 3-3", 2),
        ("-J 1,2", 2),
        ("-r n\n#PBS -J 0-2", 2),
        ("-W depend=whenever:1", 2),
        ("-W depend=afternotok:1[3].pbslab", 2),
        ("-W depend=afternotok:77.pbslab", 153),
        ("-B", 2),
        ("nothing", 2),
        ("-j oe # a remark", 2),
    ],
)
def test_directives_a_server_refuses(line, code, pbs):
    found, said = command("qsub", text=f"#!/bin/bash\n#PBS {line}\ntrue\n")
    assert (found, said.startswith("qsub:")) == (code, True)
    assert pbs.jobs() == []


def test_the_script_may_run_on_another_node(tmp_path):
    agent = tmp_path / "agent"
    agent.write_text(f'#!/bin/sh\necho "$1" >{tmp_path}/node; shift; exec bash -c "$*"\n')
    agent.chmod(0o755)
    server = Pbs.create(tmp_path / "pbs", nodes={"n1": 1, "n2": 1}, agent=str(agent))
    done = subprocess.run(
        [server.root / "bin" / "qsub", "-j", "oe", "-o", "out"],
        input='pwd; echo "$PBS_JOBID" "$#"; exit 75\n', cwd=tmp_path, text=True, check=True,
    )  # fmt: skip
    server.drain()
    assert (tmp_path / "node").read_text() == "n1\n"
    assert (tmp_path / "out").read_text() == f"{server.settings['home']}\n0.pbslab 0\n"
    assert (done.returncode, statuses(server)) == (0, [75])
