"""Queue, nodes and execution of the fake PBS. State is JSON in one folder, so commands share it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pbs_fake.request import Refused, Request

COMMANDS = ("qsub", "qstat", "qdel", "qsig", "qrerun")
WALLTIME_EXCEEDED = -29
Record = dict[str, Any]


class Pbs:
    """The server, as tests and its commands see it.

    Args:
        root: its state folder; `create` makes one.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings: Record = json.loads((root / "settings.json").read_text())

    @classmethod
    def create(
        cls,
        root: Path,
        *,
        nodes: Mapping[str, int],
        gpus: int = 0,
        path: str = "/usr/bin:/bin",
        home: Path | None = None,
        agent: str = "",
        variables: Mapping[str, str] | None = None,
        kill_delay_s: float = 10.0,
    ) -> Pbs:
        """Make a server.

        Args:
            root: Folder that must not exist.
            nodes: Name -> cores.
            gpus: Of every node.
            path: PATH of jobs; the commands' folder is put in front.
            home: Where jobs start; default: a folder in `root`.
            agent: Words that run a command on a node, as ssh does: `AGENT NODE COMMAND`. The job
                script then runs on its first node; "" runs it here.
            variables: More variables of every job.
            kill_delay_s: From SIGTERM to SIGKILL.
        """
        home = home or root / "home"
        for folder in (root / "jobs", root / "bin", home):
            folder.mkdir(parents=True)
        settings = {
            "nodes": [{"name": n, "ncpus": c, "ngpus": gpus} for n, c in nodes.items()],
            "path": f"{root / 'bin'}:{path}",
            "home": str(home),
            "agent": agent,
            "variables": dict(variables or {}),
            "kill_delay_s": kill_delay_s,
            "server": "pbslab",
        }
        (root / "settings.json").write_text(json.dumps(settings))
        for name in COMMANDS:
            program = root / "bin" / name
            program.write_text(
                "#!/bin/sh\n"
                f"PYTHONPATH={shlex.quote(str(Path(__file__).resolve().parents[1]))} "
                f"PBS_FAKE={shlex.quote(str(root))} "
                f'exec {shlex.quote(sys.executable)} -m pbs_fake.commands {name} "$@"\n'
            )
            program.chmod(0o755)
        return cls(root)

    def environment(self) -> dict[str, str]:
        """Variables with which a person's shell finds the commands."""
        return {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"}

    def job(self, job_id: str) -> Record:
        """One job's record; an array's tasks have their own.

        Raises:
            KeyError: there is none.
        """
        return self._load()[self.full(job_id)]

    def jobs(self) -> list[Record]:
        """All jobs, in the order of their submission."""
        return list(self._load().values())

    def full(self, job_id: str) -> str:
        """A job's id with the server's name."""
        return job_id if "." in job_id else f"{job_id}.{self.settings['server']}"

    def submit(self, request: Request, script: str, environment: Mapping[str, str]) -> str:
        """Queue a job; its id."""
        with self._changing() as jobs:
            for _, other in request.depend:
                if self.full(other) not in jobs:
                    raise Refused(f"qsub: Unknown Job Id {other}", 153)
            number = len({str(job["id"]).split(".")[0].split("[")[0] for job in jobs.values()})
            stem = f"{number}[]" if request.indices is not None else str(number)
            job_id = f"{stem}.{self.settings['server']}"
            (self.root / "jobs" / f"{number}.SC").write_text(script)
            impossible = self._impossible(request)
            jobs[job_id] = {
                "id": job_id,
                "number": number,
                "state": "H" if request.depend or request.held else "Q",
                "comment": f"Can Never Run: {impossible}" if impossible else "",
                "never": bool(impossible),
                "request": vars(request),
                "directory": environment.get("PWD", os.getcwd()),
                "submitter": dict(environment),
                "Exit_status": None,
                "run_count": 0,
                "output": "",
            }
        self._release()
        return job_id

    def drain(self, limit: int = 50) -> None:
        """Run jobs until none can run; at most `limit`."""
        for _ in range(limit):
            ready = [job for job in self.jobs() if job["state"] == "Q" and not job["never"]]
            if not ready:
                return
            job = ready[0]
            indices = job["request"]["indices"]
            if indices is None:
                self._run(job["id"], None)
            else:
                for index in indices:
                    self._run(job["id"], index)
                self._set(job["id"], state="F", Exit_status=0)
            self._release()
        raise AssertionError(f"more than {limit} jobs: a chain without end")

    def tell(self, job_id: str, number: signal.Signals) -> None:
        """qsig: every process of the job's session gets the signal, also the login shell."""
        for process in _session(self.job(job_id)["session"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    def delete(self, job_id: str) -> None:
        """qdel: a queued job ends, a running one gets SIGTERM and later SIGKILL."""
        job_id = self.full(job_id)
        if self.job(job_id)["state"] == "R":
            self._set(job_id, deleted=True)
        else:
            self._set(job_id, state="F", Exit_status=271)

    def _impossible(self, request: Request) -> str:
        free = [dict(node) for node in self.settings["nodes"]]
        for count, wanted in request.chunks:
            for _ in range(count):
                need = {name: int(wanted.get(name, 0)) for name in ("ncpus", "ngpus")}
                fits = [n for n in free if all(n[name] >= need[name] for name in need)]
                if not fits:
                    return "Insufficient amount of resource: ncpus"
                if request.place == "scatter":
                    free.remove(fits[0])
                else:
                    for name in need:
                        fits[0][name] -= need[name]
        return ""

    def _hosts(self, request: Record) -> list[str]:
        """The host of every rank's slot: mpiprocs times per chunk, one without it."""
        names = [node["name"] for node in self.settings["nodes"]]
        chunks = [wanted for count, wanted in request["chunks"] for _ in range(count)]
        repeats = (int(wanted.get("mpiprocs", 1)) for wanted in chunks)
        return [name for name, n in zip(names, repeats, strict=False) for _ in range(n)]

    def _run(self, job_id: str, index: int | None) -> None:
        job = self.job(job_id)
        request = job["request"]
        task = job_id if index is None else job_id.replace("[]", f"[{index}]")
        if task != job_id:
            with self._changing() as jobs:
                jobs[task] = {**job, "id": task, "state": "Q", "never": True}
        work = self.root / "jobs" / task
        work.mkdir(exist_ok=True)
        hosts = self._hosts(request)
        (work / "nodes").write_text("".join(f"{host}\n" for host in hosts))
        cores = request["chunks"][0][1]["ncpus"]
        variables = {
            "PATH": self.settings["path"],
            "HOME": self.settings["home"],
            "SHELL": "/bin/bash",
            "PBS_ENVIRONMENT": "PBS_BATCH",
            "PBS_JOBID": task,
            "PBS_JOBNAME": request["name"],
            "PBS_NODEFILE": str(work / "nodes"),
            "PBS_O_WORKDIR": job["directory"],
            "PBS_QUEUE": request["queue"],
            "TMPDIR": str(work),
            "NCPUS": cores,
            "OMP_NUM_THREADS": cores,
            **self.settings["variables"],
            **request["variables"],
        }
        if index is not None:
            variables["PBS_ARRAY_INDEX"] = str(index)
        script = self.root / "jobs" / f"{job['number']}.SC"
        # A login shell around the script, without traps of its own (measured).
        command = ["bash", "--noprofile", "-c", 'bash "$1"; exit $?', "-bash", str(script)]
        if self.settings["agent"]:
            pairs = [f"{name}={value}" for name, value in variables.items()]
            text = shlex.join(["env", "-i", "-C", variables["HOME"], *pairs, *command])
            command = [*shlex.split(self.settings["agent"]), hosts[0], text]
        output = self._output(request["output"], job["directory"], task, request["name"])
        with output.open("wb") as stream:
            process = subprocess.Popen(
                command,
                env=os.environ if self.settings["agent"] else variables,
                cwd=variables["HOME"],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._set(
                task, state="R", session=process.pid, output=str(output), run_count=1, never=False
            )
            status = self._watch(task, process, request["walltime_s"])
        self._set(task, state="F", Exit_status=status)

    def _watch(self, task: str, process: subprocess.Popen[bytes], limit_s: float | None) -> int:
        begin = time.monotonic()
        while process.poll() is None:
            over = limit_s is not None and time.monotonic() - begin > limit_s
            deleted = self.job(task).get("deleted")
            if over or deleted:
                self._end_gently(process)
                return WALLTIME_EXCEEDED if over else 256 + signal.SIGTERM
            time.sleep(0.02)
        _kill(process.pid)
        return 256 - process.returncode if process.returncode < 0 else process.returncode

    def _end_gently(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + self.settings["kill_delay_s"]
        for process_id in _session(process.pid):
            for number in (signal.SIGTERM, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, number)
        while time.monotonic() < end and (process.poll() is None or _session(process.pid)):
            time.sleep(0.02)
        _kill(process.pid)
        process.wait()

    def _output(self, wanted: str, directory: str, task: str, name: str) -> Path:
        path = Path(directory, wanted or f"{name}.o{task.split('.')[0]}")
        return path / f"{task}.OU" if path.is_dir() else path

    def _release(self) -> None:
        """Let go, or delete, jobs whose dependencies are decided."""
        with self._changing() as jobs:
            for job in jobs.values():
                depend = job["request"]["depend"]
                if job["state"] != "H" or not depend or job["request"]["held"]:
                    continue
                verdicts = [_met(kind, jobs[self.full(other)]) for kind, other in depend]
                if all(verdicts):
                    job["state"] = "Q"
                elif False in verdicts:
                    # (source) what can no longer be met deletes the job
                    job.update(state="F", comment="deleted as result of dependency")

    def _set(self, job_id: str, **values: Any) -> None:
        with self._changing() as jobs:
            jobs[job_id].update(values)

    def _load(self) -> dict[str, Record]:
        path = self.root / "jobs.json"
        return json.loads(path.read_text()) if path.exists() else {}

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Record]]:
        with (self.root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            jobs = self._load()
            yield jobs
            new = self.root / "jobs.json.new"
            new.write_text(json.dumps(jobs, default=vars))
            new.replace(self.root / "jobs.json")


def _met(kind: str, other: Record) -> bool | None:
    """Whether a dependency holds; None: not decided yet."""
    if kind == "after":
        return True if other["state"] in "RF" else None
    if other["state"] != "F":
        return None
    good = other["Exit_status"] == 0
    return {"afterok": good, "afternotok": not good, "afterany": True}[kind]


def _session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found


def _kill(leader: int) -> None:
    for process in _session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
