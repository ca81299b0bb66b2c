"""`hpctrain submit` as a command: options, profiles, the kept script, what sbatch answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from job_fakes import Fakes

from hpctrain.cli import run_command_line
from hpctrain.errors import ConfigError
from hpctrain.launch.site import Site, known_sites, load_site

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "digits.toml")
SLURM = ("--scheduler", "slurm")


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """Stand-ins on PATH, and an empty working folder."""
    made = Fakes(tmp_path / "fakes")
    made.add("sbatch")
    (made.folder / "sbatch-says").write_text("41;cluster\n")
    for name, value in made.variables(HOME=tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return made


@pytest.fixture
def submit(fakes, monkeypatch, capsys):
    """Run `hpctrain submit ...`: exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hpctrain", "submit", *words])
        monkeypatch.setattr("hpctrain.cli._voices", (sys.stdout, sys.stderr))
        code = run_command_line(["submit", *words])
        return code, *capsys.readouterr()

    return run


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def test_the_script_is_kept_and_submitted(submit, fakes):
    code, out, err = submit(CONFIG, *SLURM, "--nodes", "4", "--time", "4h")
    assert (code, err) == (0, "")
    assert fakes.words("sbatch") == ["--parsable", "runs/digits.job/job-001.sh"]
    assert "41 (slurm)" in out
    assert "runs/digits:" in out
    text = Path("runs/digits.job/job-001.sh").read_text()
    assert f"hpctrain submit {CONFIG} --scheduler slurm --nodes 4 --time 4h\n" in text
    assert "#SBATCH --time=04:00:00\n" in text


def test_the_job_runs_the_hpctrain_that_wrote_it(submit, fakes):
    submit(CONFIG, *SLURM)
    text = Path("runs/digits.job/job-001.sh").read_text()
    assert f'export PATH={Path(sys.executable).parent}:"$PATH"' in text


def test_an_edited_script_stays_as_it_is(submit):
    submit(CONFIG, *SLURM)
    first = Path("runs/digits.job/job-001.sh")
    submit(CONFIG, *SLURM)
    assert files() == [str(first)], "the same script is not written twice"
    first.write_text(edited := first.read_text() + "# mine\n")
    submit(CONFIG, *SLURM)
    assert files() == [str(first), "runs/digits.job/job-002.sh"]
    assert first.read_text() == edited


def test_the_run_folder_names_the_job(submit):
    submit(CONFIG, *SLURM, "--out", "elsewhere/trial-7")
    assert files() == ["runs/trial-7.job/job-001.sh"]
    code, _, err = submit(CONFIG, *SLURM, "--out", "elsewhere/my trial")
    assert (code, err) == (0, "")
    assert Path("runs/digits.job/job-001.sh").exists(), "no name for a job: the configuration's"


def test_a_dry_run_prints_the_script_and_writes_nothing(submit, fakes):
    (fakes.folder / "sbatch-says").write_text("sbatch: Job 7 to start at noon\n")
    code, out, err = submit(CONFIG, *SLURM, "--dry-run")
    assert code == 0
    assert out.startswith("#!/bin/bash\n")
    assert "--dry-run" not in out
    assert err == "hpctrain: sbatch: Job 7 to start at noon\n"
    assert fakes.words("sbatch") == ["--test-only"]
    (fakes.folder / "sbatch-code").write_text("1")
    code, out, err = submit(CONFIG, *SLURM, "--dry-run")
    assert code == 69
    assert out.startswith("#!/bin/bash\n")
    assert "sbatch --test-only ended with 1: sbatch: Job 7" in err
    (fakes.bin / "sbatch").unlink()
    if not Path("/usr/bin/sbatch").exists():
        assert submit(CONFIG, *SLURM, "--dry-run")[0] == 0
    assert files() == []


def test_what_sbatch_says_is_passed_on(submit, fakes):
    (fakes.folder / "sbatch-code").write_text("1")
    (fakes.folder / "sbatch-says").write_text("sbatch: error: invalid partition\n")
    code, _, err = submit(CONFIG, *SLURM, "--partition", "gpu")
    assert code == 69
    assert "invalid partition" in err
    assert "runs/digits.job/job-001.sh" in err


def test_a_scheduler_that_is_not_here_is_named(submit, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    code, _, err = submit(CONFIG, "--scheduler", "pbs")
    assert code == 69
    assert "qsub is not on PATH: submit on a login node" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "--scheduler slurm or pbs"),
        (("--scheduler", "lsf"), 2, "slurm or pbs"),
        (("--scheduler", "pbs", "--site", "generic-slurm"), 2, "is one of slurm"),
        ((*SLURM, "--launcher", "mpiexec"), 2, 'belongs to scheduler = "pbs"'),
        ((*SLURM, "--launcher", "prun"), 2, "--launcher prun"),
        ((*SLURM, "--site", "generic-slrum"), 78, 'did you mean "generic-slurm"'),
        ((*SLURM, "--time", "soon"), 2, "--time soon"),
        ((*SLURM, "--seeds", "1,x"), 2, "--seeds 1,x"),
        ((*SLURM, "--seeds", "0-4000000000"), 2, "at most 1000"),
        ((*SLURM, "--env", "X"), 2, "NAME=VALUE"),
        ((*SLURM, "--name", "a b"), 2, "--name 'a b'"),
        ((*SLURM, "--directive", "x"), 2, "starts with '-'"),
        (("--scheduler", "pbs", "--after-stop", "requeue"), 2, "pbs knows chain, exit"),
        ((*SLURM, "--set", "lr.bsae=1"), 78, "lr.bsae"),
        ((*SLURM, "--nodes", "0"), 2, "--nodes"),
    ],
)
def test_a_mistake_submits_nothing(words, code, message, submit, fakes):
    found, _, err = submit(CONFIG, *words)
    assert (found, message in err) == (code, True), err
    assert files() == []
    assert fakes.words("sbatch") == []


def test_an_image_of_another_mpi_is_refused(submit, fakes):
    Path("x.sif").touch()
    fakes.add("apptainer")
    (fakes.folder / "apptainer-says").write_text(
        '{"data": {"attributes": {"labels": {"org.hpctrain.mpi": "mpich"}}}}'
    )
    code, _, err = submit(CONFIG, *SLURM, "--container", "x.sif")
    assert (code, fakes.words("sbatch")) == (69, [])
    assert "mpich" in err
    code, _, err = submit(CONFIG, *SLURM, "--container", "not-here.sif")
    assert code == 0
    assert "not-here.sif is not checked: no such file here" in err


def test_a_profile_with_a_set_up_brings_its_own_hpctrain(submit, tmp_path, monkeypatch):
    monkeypatch.setenv("HPCTRAIN_SITES", str(tmp_path / "sites"))
    (tmp_path / "sites").mkdir()
    (tmp_path / "sites" / "mine.toml").write_text(
        'scheduler = "slurm"\nlauncher = "srun"\nmodules = ["gcc 12", "mpi"]\n'
        'setup = [". /opt/train/bin/activate"]\ndirectives = ["--constraint=x"]\n'
        '[environment]\nFI_PROVIDER = "$HOME is not expanded"\n'
    )
    _, out, _ = submit(CONFIG, "--site", "mine", "--dry-run", "--directive=--mem=0")
    assert "export PATH=" not in out
    assert "module load 'gcc 12' mpi\n. /opt/train/bin/activate\n" in out
    assert "export FI_PROVIDER='$HOME is not expanded'\nset -u\n" in out
    assert "#SBATCH --constraint=x\n#SBATCH --mem=0\n\n" in out


def test_profiles_are_looked_for_in_three_places(tmp_path):
    own, home = tmp_path / "own", tmp_path / "home"
    folder = home / ".config" / "hpctrain" / "sites"
    for place in (own, folder):
        place.mkdir(parents=True)
        (place / "both.toml").write_text(f'scheduler = "pbs"\ntitle = "{place.name}"\n')
    (folder / "generic-pbs.toml").write_text('scheduler = "pbs"\ntitle = "mine"\n')
    environment = {"HPCTRAIN_SITES": str(own), "HOME": str(home)}
    assert load_site("both", environment).title == "own"
    assert load_site("both", {"HOME": str(home)}).title == "sites"
    assert load_site("generic-pbs", environment).title == "mine"
    assert load_site(str(own / "both.toml"), {}).title == "own"
    assert {"generic-slurm", "generic-pbs", "slingshot-slurm", "pals-pbs"} <= set(known_sites({}))


@pytest.mark.parametrize("name", sorted(known_sites({})))
def test_the_shipped_profiles_are_good(name):
    assert isinstance(load_site(name, {}), Site)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "scheduler is missing"),
        ('scheduler = "slurm"\nluancher = "srun"', 'did you mean "launcher"'),
        ('scheduler = "slurm"\nlauncher = "mpiexec"', 'belongs to scheduler = "pbs"'),
        ('scheduler = "pbs"\nlauncher = "mpiexec"', "(Cray PALS)"),
        ('scheduler = "pbs"\n[environment]\n"A;B" = "x"', "A;B"),
        ('scheduler = "pbs"\ndirectives = ["-l x\\ny"]', "one line"),
        ('scheduler = "pbs"\nchunk = ["a b"]', "chunk"),
        ("scheduler = ", "not valid TOML"),
    ],
)
def test_a_mistake_in_a_profile_names_file_and_key(text, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_site(str(path))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_site(str(tmp_path / "none.toml"))


def test_every_key_of_a_profile_is_documented():
    text = (ROOT / "docs" / "jobs.md").read_text()
    assert [key for key in Site.model_fields if f"`{key}`" not in text] == []


def test_help_is_printed_without_loading_torch_or_mpi():
    code = (
        "import sys\nfrom hpctrain.cli import run_command_line\n"
        "try:\n    run_command_line(['submit', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'mpi4py', 'horovod', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--gpus-per-node" in done.stdout
