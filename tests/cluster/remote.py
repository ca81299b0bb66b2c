"""Commands on other nodes, as ssh would run them: over a socket in the cluster's shared folder.

A process of one node cannot enter another node's namespaces, the head's process 1 can. The client
hands its own standard streams over; when it goes away, what it started is killed.

    python -m tests.cluster.remote FOLDER NODE COMMAND...     (this is mpirun's agent)
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading

from tests.cluster.plan import HEAD, Plan

_SOCKET = "remote.socket"
EXIT_UNREACHABLE = 255


class Server:
    """Runs in process 1 of the cluster; one thread per command."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> Server:
        with _short_path(self._plan) as path:
            if os.path.exists(path):
                os.unlink(path)
            self._listener.bind(path)
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def serve_for_ever(self) -> None:
        while True:
            signal.pause()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            request, streams = _receive(client)
            code = self._run(request, streams, client)
            with contextlib.suppress(OSError):
                client.sendall(json.dumps(code).encode())

    def _run(self, request: dict, streams: list[int], client: socket.socket) -> int:
        try:
            enter = _enter(self._plan, request["node"])
            if enter is None:
                text = f"remote: {request['node']} is down or unknown\n"
                os.write(streams[2], text.encode())
                return EXIT_UNREACHABLE
            command = [*enter, "setpriv", "--pdeathsig", "KILL", "--", *request["command"]]
            process = subprocess.Popen(
                command,
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                env=request["environment"] | {"PWD": request["folder"]},
                cwd=request["folder"] if os.path.isdir(request["folder"]) else "/",
                start_new_session=True,
            )
        finally:
            for stream in streams:
                os.close(stream)
        threading.Thread(target=_end_with, args=(client, process), daemon=True).start()
        code = process.wait()
        return code if code >= 0 else 128 - code


def run_on(plan: Plan, node: str, command: list[str]) -> int:
    """Run a command on a node with this process's streams; its exit code. From inside only."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        with _short_path(plan) as path:
            server.connect(path)
        request = {
            "node": node,
            "command": command,
            "environment": dict(os.environ),
            "folder": os.getcwd(),
        }
        streams = array.array("i", [0, 1, 2])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)]
        server.sendmsg([b"\0"], rights)
        text = json.dumps(request).encode()
        server.sendall(len(text).to_bytes(8, "little") + text)
        answer = server.recv(64)
    return json.loads(answer) if answer else EXIT_UNREACHABLE


def _receive(client: socket.socket) -> tuple[dict, list[int]]:
    size = array.array("i").itemsize
    _, ancillary, _, _ = client.recvmsg(1, socket.CMSG_SPACE(3 * size))
    streams = array.array("i")
    for _, _, data in ancillary:
        streams.frombytes(data[: len(data) - len(data) % size])
    with client.makefile("rb") as reader:
        length = int.from_bytes(reader.read(8), "little")
        return json.loads(reader.read(length)), list(streams)


def _end_with(client: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """Kill what the client started once it is gone."""
    with contextlib.suppress(OSError):
        if not client.recv(1) and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _enter(plan: Plan, node: str) -> list[str] | None:
    if node == HEAD:
        return []
    pid = plan.pid(node) if node in plan.names else None
    if pid is None:
        return None
    return ["nsenter", "--target", str(pid), "--net", "--uts", "--mount", "--pid"]


@contextlib.contextmanager
def _short_path(plan: Plan):
    """A name for the socket below the 107 bytes that a socket's path may have."""
    handle = os.open(plan.folder, os.O_PATH)
    try:
        yield f"/proc/self/fd/{handle}/{_SOCKET}"
    finally:
        os.close(handle)


def main() -> int:
    folder, node, *command = sys.argv[1:]
    return run_on(Plan.load(folder), node, ["bash", "-c", " ".join(command)])


if __name__ == "__main__":
    sys.exit(main())
