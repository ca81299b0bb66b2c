"""What qsub accepts: its options, from directives and from the command line, checked as PBS does.

Exit codes of refusals are the low byte of the server's error number, as PBS's commands return them.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

USAGE = 2
BAD_VALUE = 166  # PBSE_BADATVAL, 15014
UNKNOWN_JOB = 153  # PBSE_UNKJOBID, 15001
UNKNOWN_QUEUE = 170  # PBSE_UNKQUE, 15018
UNKNOWN_RESOURCE = 187  # PBSE_UNKRESC, 15035; measured

WITH_VALUE = "aACceghjJklmMNopPqrRSuvWZ"
WITHOUT_VALUE = "fhIVXxz"
JOB_RESOURCES = {"select", "place", "walltime", "software", "filesystems"}
CHUNK_RESOURCES = {"ncpus", "mpiprocs", "ngpus", "ompthreads", "mem", "host", "vnode", "system"}
PLACES = {"free", "pack", "scatter", "vscatter"}
SHARING = {"excl", "exclhost", "shared"}
DEPENDENCIES = {"after", "afterok", "afternotok", "afterany"}


class Refused(Exception):
    """qsub's message and its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Request:
    """A job as asked for."""

    name: str = "STDIN"
    output: str = ""
    join: str = "n"
    rerunnable: bool = True
    queue: str = "workq"
    account: str = ""
    walltime_s: float | None = None
    chunks: list[tuple[int, dict[str, str]]] = field(default_factory=lambda: [(1, {"ncpus": "1"})])
    variables: dict[str, str] = field(default_factory=dict)
    depend: list[tuple[str, str]] = field(default_factory=list)
    indices: list[int] | None = None
    held: bool = False
    place: str = "free"


def parse(script: str, arguments: list[str], environment: dict[str, str]) -> Request:
    """Options of a script's directives, then those of the command line, which win."""
    request = Request()
    found: list[tuple[str, str]] = []
    for words in [*directives(script), arguments]:
        found += options(words)
    letters = [letter for letter, _ in found]
    for letter, value in found:
        _apply(request, letter, value, environment)
    if request.indices is not None and not request.rerunnable:
        raise Refused("qsub: cannot submit non-rerunable Array Job", USAGE)  # (source)
    if "l" in letters:
        resources = [value.split("=")[0] for letter, value in found if letter == "l"]
        if resources.count("select") > 1:
            raise Refused("qsub: Resource already specified: select", BAD_VALUE)
    return request


def directives(script: str) -> list[list[str]]:
    """Words of every #PBS line up to the first command."""
    found = []
    for number, line in enumerate(script.splitlines()):
        if line.startswith("#PBS"):
            if not line.startswith("#PBS "):
                raise Refused(f"qsub: directive error: {line}", USAGE)
            found.append(shlex.split(line[5:]))
        elif line.strip() and not line.startswith("#") and number:
            break
    return found


def options(words: list[str]) -> list[tuple[str, str]]:
    """(letter, value) pairs, as getopt reads them."""
    found = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not re.match(r"-[A-Za-z]", word):
            raise Refused(f"qsub: directive error: {word}\nusage: qsub [-a date_time] ...", USAGE)
        letter, value = word[1], word[2:]
        if letter in WITH_VALUE:
            if not value:
                if not rest:
                    raise Refused(f"qsub: option requires an argument -- '{letter}'", USAGE)
                value = rest.pop(0)
        elif letter not in WITHOUT_VALUE or value:
            raise Refused(f"qsub: invalid option -- '{letter}'", USAGE)
        found.append((letter, value))
    return found


def _apply(request: Request, letter: str, value: str, environment: dict[str, str]) -> None:
    def need(good: object, code: int = USAGE) -> None:
        if not good:
            raise Refused(f"qsub: illegal -{letter} value", code)

    if letter == "N":
        # (source) at most 230 characters, printable, without blanks; the first one a letter
        need(re.fullmatch(r"[A-Za-z][!-~]{0,229}", value))
        request.name = value
    elif letter == "o":
        need(value)
        request.output = value
    elif letter == "j":
        need(value in ("oe", "eo", "n"))
        request.join = value
    elif letter == "k":
        need(value == "n" or re.fullmatch(r"(?!.*(.).*\1)[oed]{1,3}", value) and value != "d")
    elif letter == "r":
        need(value in ("y", "n"))
        request.rerunnable = value == "y"
    elif letter == "q":
        need(re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*(@[A-Za-z0-9_.-]+)?", value))
        if value.partition("@")[0] not in ("workq", "gpu", "prod"):
            raise Refused("qsub: Unknown queue", UNKNOWN_QUEUE)
        request.queue = value
    elif letter == "A":
        need(value)
        request.account = value
    elif letter == "h":
        request.held = True
    elif letter == "v":
        for part in value.split(","):
            name, equals, text = part.partition("=")
            need(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name))
            request.variables[name] = text if equals else environment.get(name, "")
    elif letter == "V":
        request.variables.update(environment)
    elif letter == "J":
        request.indices = _indices(value)
    elif letter == "W":
        _attribute(request, value)
    elif letter == "l":
        _resource(request, value)
    else:
        raise Refused(f"the fake qsub has no option -{letter}; add it", USAGE)


def _indices(value: str) -> list[int]:
    # (source) X-Y[:Z] with X < Y, so that one task alone is X-(X+1):2
    match = re.fullmatch(r"(\d+)-(\d+)(?::(\d+))?(?:%\d+)?", value)
    if not match or int(match[1]) >= int(match[2]) or match[3] == "0":
        raise Refused("qsub: illegal -J value", USAGE)
    return list(range(int(match[1]), int(match[2]) + 1, int(match[3] or 1)))


def _attribute(request: Request, value: str) -> None:
    name, _, text = value.partition("=")
    if name != "depend":
        raise Refused("qsub: illegal -W value", USAGE)
    for part in text.split(","):
        kind, *jobs = part.split(":")
        if kind not in DEPENDENCIES or not jobs:
            raise Refused("qsub: illegal -W value", USAGE)
        for job in jobs:
            if not re.fullmatch(r"\d+(\[\])?(\.[A-Za-z0-9.-]+)?", job):
                # (source) no dependency on one task of an array
                raise Refused("qsub: illegal -W value", USAGE)
            request.depend.append((kind, job))


def _resource(request: Request, value: str) -> None:
    name, equals, text = value.partition("=")
    if name not in JOB_RESOURCES:
        raise Refused(f"qsub: Unknown resource: {name}", UNKNOWN_RESOURCE)
    if not equals or not text:
        raise Refused(f"qsub: Illegal attribute or resource value: {name}", BAD_VALUE)
    if name == "walltime":
        request.walltime_s = _walltime(text)
    elif name == "select":
        request.chunks = [_chunk(part) for part in text.split("+")]
    elif name == "place":
        arrangement, *sharing = text.split(":")
        if arrangement not in PLACES | SHARING or set(sharing) - SHARING:
            raise Refused("qsub: Illegal attribute or resource value: place", BAD_VALUE)
        request.place = arrangement


def _walltime(text: str) -> float:
    match = re.fullmatch(r"(?:(?:(\d+):)?(\d{1,2}):)?(\d+)", text)
    if not match:
        raise Refused("qsub: Illegal attribute or resource value: walltime", BAD_VALUE)
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def _chunk(text: str) -> tuple[int, dict[str, str]]:
    first, *rest = text.split(":")
    count = 1
    if first.isdigit():
        count = int(first)
    else:
        rest = [first, *rest]
    resources: dict[str, str] = {}
    for part in rest:
        name, equals, value = part.partition("=")
        if not equals or not value or name in resources or count < 1:
            raise Refused("qsub: Illegal attribute or resource value: select", BAD_VALUE)
        if name not in CHUNK_RESOURCES:
            raise Refused(f"qsub: Unknown resource: {name}", UNKNOWN_RESOURCE)
        if name in ("ncpus", "mpiprocs", "ngpus", "ompthreads") and not value.isdigit():
            raise Refused(f"qsub: Illegal attribute or resource value: {name}", BAD_VALUE)
        resources[name] = value
    return count, {"ncpus": "1", **resources}
