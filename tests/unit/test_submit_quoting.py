"""No text that a person gives runs anything in a job script; each arrives as one word."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from job_fakes import Fakes
from test_submit_scripts import JOB

from hpctrain.errors import UsageError
from hpctrain.launch.job import Job, quoted
from hpctrain.launch.site import Site
from hpctrain.launch.submit import render

NASTY = [
    "$(touch canary)", "`touch canary`", "'; touch canary; '", '"; touch canary; "', "a\nb",
    "a\n#SBATCH --nodes=99\ntouch canary", "\\", "\\\n", "$'\\x41'", "!!", "~", "*", "-rf", ":",
    "${PATH}", "a b", "\t", "\r\n", "\x1b[31m", "é", "\u2028", "\udcff", "&", "|", "<x", "%j", "#",
    "$((1+1))", "'", '"', " lead", "trail ", "=", "\x01'\\", "--", "{nodes}",
]  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    st.lists(st.sampled_from(NASTY), min_size=1, max_size=3).map("".join),
)
SITES = {
    "slurm": Site(scheduler="slurm", launcher="srun"),
    "mpirun": Site(scheduler="slurm", launcher="mpirun"),
    "pbs": Site(scheduler="pbs"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[Fakes, Path]:
    folder = tmp_path_factory.mktemp("quoting")
    (folder / "work").mkdir()
    (folder / "nodes").write_text("n1\nn2\n")
    return Fakes(folder / "fakes"), folder


@given(text=TEXTS)
def test_a_quoted_text_is_one_line_and_one_word(text):
    word = quoted(text)
    assert word.isprintable()
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {word} end"], capture_output=True, check=True
    )
    assert done.stdout == text.encode("utf-8", "surrogateescape") + b"\0end\0"


@settings(max_examples=30)
@given(
    setting=TEXTS, path=TEXTS, config=TEXTS, image=TEXTS, value=TEXTS,
    site=st.sampled_from(sorted(SITES)), array=st.booleans(),
)  # fmt: skip
@example("a=$(touch canary)", ":", "-x", "\n", "'", "slurm", False)
def test_any_text_arrives_as_it_is_and_runs_nothing(
    place, setting, path, config, image, value, site, array
):
    fakes, folder = place
    job = Job(
        **{**vars(JOB), "after_stop": "chain"}
        | {"out": path or "o", "config": config or "c", "container": image}
        | {"settings": (f"x={setting}", setting), "environment": {"GIVEN": value}}
        | {"seeds": (4, 5) if array else (), "command": ("hpctrain", setting, path)}
    )
    script = render(job, SITES[site])
    fakes.plan("fresh:0")
    code, said = fakes.run(
        script, folder / "work", SLURM_ARRAY_JOB_ID=1, SLURM_ARRAY_TASK_ID=1, PBS_ARRAY_INDEX=1,
        PBS_JOBID="1[1].server", PBS_NODEFILE=folder / "nodes", PBS_O_WORKDIR=folder / "work",
    )  # fmt: skip
    assert code == 0, said
    seed, end = (["--set=seed=5"], "-seed-5") if array else ([], "")
    dot = "./" if job.config[:1] in ("-", ":") else ""
    dots = "./" if job.out[:1] in ("-", ":") else ""
    assert fakes.arguments()[:-1] == [
        "train", dot + job.config, f"--set=x={setting}", f"--set={setting}", *seed,
        f"--out={dots}{job.out}{end}", "--resume=auto",
    ]  # fmt: skip
    assert fakes.environment()["GIVEN"] == value
    if image:
        dot = "./" if image[:1] in ("-", ":") else ""
        words = fakes.words("launcher")
        assert words[words.index("hpctrain", words.index("exec")) - 1] == dot + image
    assert list((folder / "work").iterdir()) == []
    assert directives(script) == directives(render(plain(job), SITES[site]))


def plain(job: Job) -> Job:
    """The same job with harmless texts: its directives must be the same."""
    return replace(
        job,
        out="o",
        config="c",
        container="i" if job.container else "",
        settings=(),
        environment={},
        command=("hpctrain",),
    )


def directives(script: str) -> list[str]:
    """What the scheduler reads: the lines before the first command."""
    head = script[: script.index("\n\n")].splitlines()
    assert all(line.startswith("#") for line in head)
    return [line for line in head if line.startswith(("#SBATCH", "#PBS"))]


@pytest.mark.parametrize("text", [text for text in NASTY if text != "é"])
@pytest.mark.parametrize("key", ["name", "queue", "account"])
def test_directive_values_are_refused_with_what_is_allowed(key, text):
    with pytest.raises(UsageError, match=rf"^--{key} .*letter"):
        replace(JOB, **{key: f"a{text}" if text[:1] != "-" else text})


@pytest.mark.parametrize("text", ["--x\n#SBATCH --y", "--x\r", "x", "", "--x\x00", "--x\u2028y"])
def test_a_directive_is_one_line_that_starts_with_a_dash(text):
    with pytest.raises(UsageError, match="--directive"):
        replace(JOB, directives=(text,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"environment": {"A B": "x"}}, "--env"),
        ({"environment": {"SLURM_CPUS_PER_TASK": "4"}}, "set this one themselves"),
        ({"limit_s": 30}, "--time"),
        ({"lead_s": 3600}, "--signal-lead"),
        ({"nodes": 0}, "--nodes"),
        ({"out": ""}, "empty path"),
        ({"out": "a\0b"}, "NUL"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"seeds": (1,), "settings": ("seed=2",)}, "one of the two"),
    ],
)
def test_a_job_that_cannot_be_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        replace(JOB, **changes)
