"""Job scripts: the rendered examples, and SLURM's scripts run by bash against stand-ins."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from golden_jobs import COMMANDS, JOBS, rendered
from job_fakes import Fakes

from hpctrain.launch.job import Job, Program
from hpctrain.launch.site import Site
from hpctrain.launch.submit import render

SLURM = Site(scheduler="slurm", launcher="srun")
JOB = Job(
    name="run",
    out="runs/run",
    folder="runs/run.job",
    script="runs/run.job/job-001.sh",
    limit_s=3600,
    after_stop="requeue",
    config="my.toml",
    ranks_per_node=2,
    cpus_per_rank=3,
    max_attempts=5,
)
CHAIN = replace(JOB, after_stop="chain")


@pytest.fixture
def fakes(tmp_path: Path) -> Fakes:
    (tmp_path / "runs" / "run.job").mkdir(parents=True)
    made = Fakes(tmp_path / "fakes")
    made.add("scontrol")
    made.add("sbatch")
    return made


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_what_submit_prints(name):
    hint = "if the change is meant: python tests/golden_jobs.py"
    assert (JOBS / name).read_text() == rendered(COMMANDS[name]), hint


def test_there_are_no_other_examples():
    assert {path.name for path in JOBS.glob("*.sh")} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_good_bash(name):
    checks = [["bash", "-n"]] + ([["shellcheck"]] if shutil.which("shellcheck") else [])
    for check in checks:
        done = subprocess.run([*check, JOBS / name], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_complete_run_ends_the_chain(fakes, tmp_path):
    fakes.plan(0)
    code, said = fakes.run(render(JOB, SLURM), tmp_path)
    assert code == 0, said
    assert fakes.words("scontrol") == fakes.words("sbatch") == []
    assert fakes.arguments() == [
        "train", "my.toml", "--out=runs/run", "--resume=auto", f"--walltime={limit(fakes)}",
    ]  # fmt: skip
    assert fakes.words("launcher")[:6] == [
        "--mpi=pmix", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3",
        "--kill-on-bad-exit=0", "--wait=30",
    ]  # fmt: skip
    found = fakes.environment()
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["TRITON_CACHE_DIR"].startswith(str(fakes.folder))
    assert found["SLURM_CPUS_PER_TASK"] == "3"
    assert "SRUN_CPUS_PER_TASK" not in found


def limit(fakes: Fakes) -> str:
    """The deadline given to hpctrain: the time limit, less the seconds since the script began."""
    given = fakes.arguments()[-1].removeprefix("--walltime=")
    assert 3590 <= int(given) <= 3600
    return given


def test_slurm_s_own_end_time_is_left_to_hpctrain(fakes, tmp_path):
    fakes.plan(0)
    fakes.run(render(JOB, SLURM), tmp_path, SLURM_JOB_END_TIME="1999999999")
    assert fakes.arguments()[-1] == "--resume=auto"


def test_after_75_the_job_is_requeued(fakes, tmp_path):
    fakes.plan(75)
    code, said = fakes.run(render(JOB, SLURM), tmp_path)
    assert code == 75
    assert fakes.words("scontrol") == ["requeue", "7"]
    assert "attempt 1 ended with 75" in said


def test_attempts_are_counted_over_requeues_and_chained_jobs(fakes, tmp_path):
    fakes.plan(75, 75)
    code, said = fakes.run(render(JOB, SLURM), tmp_path, SLURM_RESTART_COUNT=2, HPCTRAIN_ATTEMPT=2)
    assert (code, fakes.words("scontrol")) == (75, ["requeue", "7"])
    assert "attempt 4" in said
    assert "HPCTRAIN_ATTEMPT" not in fakes.environment(), "nor in what the job submits itself"
    code, said = fakes.run(render(JOB, SLURM), tmp_path, SLURM_RESTART_COUNT=2, HPCTRAIN_ATTEMPT=3)
    assert (code, fakes.words("scontrol")) == (75, ["requeue", "7"]), "not a second time"
    assert "5 attempts are over" in said


def test_after_75_a_chain_submits_the_next_job(fakes, tmp_path):
    fakes.plan(75)
    code, _ = fakes.run(render(CHAIN, SLURM), tmp_path, SLURM_RESTART_COUNT=1)
    assert code == 75
    assert fakes.words("sbatch") == ["--export=ALL,HPCTRAIN_ATTEMPT=3", JOB.script]
    assert (fakes.folder / "sbatch-saw").read_text() == "unset unset\n"
    assert fakes.words("scontrol") == []


@pytest.mark.parametrize("code", [2, 65, 69, 70, 73, 78, 126, 127])
def test_what_would_fail_again_is_not_tried_again(code, fakes, tmp_path):
    fakes.plan(code)
    assert fakes.run(render(JOB, SLURM), tmp_path)[0] == code
    assert fakes.words("scontrol") == []


def test_a_killed_rank_is_tried_again_twice_in_a_row(fakes, tmp_path):
    script = render(JOB, SLURM)
    fakes.plan("kill", "kill", "kill")
    codes = [fakes.run(script, tmp_path, SLURM_RESTART_COUNT=n)[0] for n in range(3)]
    assert codes == [137] * 3
    assert fakes.words("scontrol") == ["requeue", "7"] * 2
    fakes.plan("kill", 75, "kill", "kill")
    for n in range(4):
        fakes.run(script, tmp_path, SLURM_RESTART_COUNT=n)
    assert fakes.words("scontrol") == ["requeue", "7"] * 6, "a clean stop begins the count anew"


def test_max_failures_0_and_a_launch_that_never_trained_end_the_job(fakes, tmp_path):
    fakes.plan("kill", "fresh:1")
    assert fakes.run(render(replace(JOB, max_failures=0), SLURM), tmp_path)[0] == 137
    shutil.rmtree(tmp_path / "runs" / "run")
    assert fakes.run(render(JOB, SLURM), tmp_path)[0] == 1
    assert fakes.words("scontrol") == []


def test_a_stop_by_hand_is_for_good(fakes, tmp_path):
    fakes.plan("stop:75", 75)
    code, said = fakes.run(render(JOB, SLURM), tmp_path)
    assert (code, fakes.words("scontrol")) == (75, [])
    assert "ended by hpctrain stop" in said
    fakes.run(render(JOB, SLURM), tmp_path)
    assert fakes.words("scontrol") == ["requeue", "7"], "the next start removes the old request"


def test_after_stop_exit_does_nothing(fakes, tmp_path):
    fakes.plan(75)
    script = render(replace(JOB, after_stop="exit"), SLURM)
    assert fakes.run(script, tmp_path)[0] == 75
    assert fakes.words("scontrol") == fakes.words("sbatch") == []
    assert "#SBATCH --no-requeue" in script


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_usr1_to_the_batch_shell_reaches_the_ranks(launcher, fakes, tmp_path):
    site = Site(scheduler="slurm", launcher=launcher)
    script = render(JOB, site)
    directive = "--signal=USR1@300" if launcher == "srun" else "--signal=B:USR1@300"
    assert f"#SBATCH {directive}\n" in script
    fakes.plan("wait")
    process = fakes.start(script, tmp_path)
    wait_until(fakes.folder / "training")
    while process.poll() is None:  # also while it saves, and while it ends
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.03)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert fakes.words("scontrol") == ["requeue", "7"]


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_with_a_container_usr1_to_the_batch_shell_asks_by_file(launcher, fakes, tmp_path):
    """The processes between launcher and ranks do not survive the signal."""
    script = render(replace(JOB, container="x.sif"), Site(scheduler="slurm", launcher=launcher))
    assert "#SBATCH --signal=B:USR1@300\n" in script
    fakes.plan("file")
    process = fakes.start(script, tmp_path)
    wait_until(fakes.folder / "training")
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert fakes.words("scontrol") == ["requeue", "7"]


def test_hpctrain_stop_ends_a_container_for_good(fakes, tmp_path):
    fakes.plan("stop:75")
    code, said = fakes.run(render(replace(JOB, container="x.sif"), SLURM), tmp_path)
    assert (code, fakes.words("scontrol")) == (75, [])
    assert "ended by hpctrain stop" in said


def test_scancel_saves_and_does_not_requeue(fakes, tmp_path):
    fakes.plan("wait")
    process = fakes.start(render(JOB, SLURM), tmp_path)
    wait_until(fakes.folder / "training")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert (process.returncode, fakes.words("scontrol")) == (75, [])
    assert "told to end" in said


def wait_until(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not come"
        time.sleep(0.01)


def test_each_task_of_an_array_has_its_seed_folder_and_id(fakes, tmp_path):
    job = replace(JOB, seeds=(3, 11, 12))
    fakes.plan(75)
    code, _ = fakes.run(render(job, SLURM), tmp_path, SLURM_ARRAY_JOB_ID=5, SLURM_ARRAY_TASK_ID=1)
    assert code == 75
    assert fakes.words("scontrol") == ["requeue", "5_1"]
    assert fakes.arguments()[2:4] == ["--set=seed=11", "--out=runs/run-seed-11"]
    chained = replace(job, after_stop="chain")
    fakes.plan(75)
    fakes.run(render(chained, SLURM), tmp_path, SLURM_ARRAY_JOB_ID=5, SLURM_ARRAY_TASK_ID=2)
    assert fakes.words("sbatch")[1:] == ["--array=2", JOB.script]
    assert "#SBATCH --array=0-2\n" in render(job, SLURM)


def test_one_seed_needs_no_array(fakes, tmp_path):
    fakes.plan(0)
    script = render(replace(JOB, seeds=(3,)), SLURM)
    assert "--array" not in script
    fakes.run(script, tmp_path)
    assert fakes.arguments()[2:4] == ["--set=seed=3", "--out=runs/run-seed-3"]


def test_activation_may_use_unset_variables_and_what_is_missing_is_named(fakes, tmp_path):
    fakes.plan(0)
    site = SLURM.model_copy(update={"setup": ['export SEEN="set-up$NOT_SET_ANYWHERE"']})
    assert fakes.run(render(JOB, site), tmp_path)[0] == 0
    assert fakes.environment()["SEEN"] == "set-up"
    job = replace(JOB, program=Program(("no-such-program",)))
    code, said = fakes.run(render(job, site), tmp_path)
    assert (code, said) == (69, "job 7: no no-such-program on PATH after the set-up\n")


def test_mpirun_places_ranks_and_takes_the_environment_along(fakes, tmp_path):
    fakes.plan(0)
    site = Site(scheduler="slurm", launcher="mpirun", environment={"FABRIC": "a b"}, agent="ssh")
    fakes.run(render(JOB, site), tmp_path, HPCTRAIN_DATA="/data")
    words = fakes.words("launcher")
    assert words[:6] == ["-n", "4", "--map-by", "ppr:2:node", "--bind-to", "none"]
    forwarded = {name for flag, name in zip(words, words[1:], strict=False) if flag == "-x"}
    assert {"PATH", "FABRIC", "HPCTRAIN_DATA", "OMP_NUM_THREADS"} <= forwarded
    assert "LD_LIBRARY_PATH" not in forwarded, "mpirun warns of variables that are not set"
    found = fakes.environment()
    assert found["FABRIC"] == "a b"
    assert found["OMPI_MCA_plm_rsh_agent"] == found["PRTE_MCA_plm_ssh_agent"] == "ssh"


def test_a_site_may_place_the_ranks_itself(fakes, tmp_path):
    fakes.plan(0)
    site = Site(
        scheduler="slurm",
        launcher="mpirun",
        placement=["--map-by", "ppr:{ranks_per_node}:node:PE={cpus_per_rank}"],
        launcher_flags=["--tag output"],
    )
    fakes.run(render(JOB, site), tmp_path)
    assert fakes.words("launcher")[2:5] == ["--map-by", "ppr:2:node:PE=3", "--tag output"]
    hydra = Site(scheduler="slurm", launcher="mpirun", mpi="mpich")
    fakes.plan(0)
    fakes.run(render(JOB, hydra), tmp_path)
    assert fakes.words("launcher")[:4] == ["-n", "4", "-ppn", "2"]


def test_a_container_stands_between_launcher_and_hpctrain(fakes, tmp_path):
    fakes.plan(0)
    site = SLURM.model_copy(update={"binds": ["/data:/data:ro"], "container_flags": ["--no-home"]})
    job = replace(JOB, container="my image.sif", gpus_per_node=2, binds=("/scratch",))
    script = render(job, site)
    assert fakes.run(script, tmp_path)[0] == 0
    words = fakes.words("launcher")
    start = words.index("apptainer")
    gpu = [word for word in words if word in ("--nv", "--rocm")]
    assert words[start : words.index("hpctrain")] == [
        "apptainer", "exec", "--sharens", *gpu, "--bind", "/data:/data:ro", "--bind", "/scratch",
        "--no-home", "my image.sif",
    ]  # fmt: skip
    assert "/dev/nvidiactl" in script
    assert "/dev/nvidiactl" not in render(replace(job, gpus_per_node=0), site)
    assert "#SBATCH --gpus-per-node=2\n" in script
    older = SLURM.model_copy(update={"gpu_request": "gres"})
    assert "#SBATCH --gres=gpu:2\n" in render(job, older)


@pytest.mark.parametrize(
    ("limit_s", "lead"), [(60, 10), (120, 20), (600, 100), (1800, 300), (86400, 300)]
)
def test_the_signal_comes_early_enough_and_never_takes_most_of_the_time(limit_s, lead):
    assert replace(JOB, limit_s=limit_s).lead == lead
    assert replace(JOB, limit_s=limit_s, lead_s=7).lead == 7


def test_a_day_and_more_are_written_as_each_scheduler_reads_them():
    job = replace(CHAIN, limit_s=90061)
    assert "#SBATCH --time=1-01:01:01\n" in render(job, SLURM)
    assert "#PBS -l walltime=25:01:01\n" in render(job, Site(scheduler="pbs"))
