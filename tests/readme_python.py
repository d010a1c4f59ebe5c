"""`python` for the README's commands: a process that has imported everything once and forks one for each of them.

An interpreter that imports torch and polars takes three seconds, a fork some milliseconds. As a program: the server,
`readme_python.py SOCKET`.
"""

import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import sys
from pathlib import Path

from readme_caps import NOT_RUN, capped

CLIENT = """#!{python} -IS
import json, os, socket, sys
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
if not (words[0] == "distmeta" or words[1:2] == ["-m"] and words[2].partition(".")[0] in ("jobs", "tune")):
    os.execv("{python}", ["{python}", *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{socket}")
    socket.send_fds(server, [b"+"], [0, 1, 2])
    server.sendall(json.dumps([words, os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(9) or b"137"))
"""


def serve(where: str) -> None:
    """Answer clients until killed."""
    import distmeta.commands
    import distmeta.evaluation
    import distmeta.methods

    for package in (distmeta.commands, distmeta.methods, distmeta.evaluation):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    for name in ("torch._inductor", "polars", "pyarrow.dataset", "distmeta.parallel.trainer"):
        importlib.import_module(name)
    assert "ray" not in sys.modules, "its threads do not survive a fork"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(where)
        listening.listen()
        while True:
            client, _ = listening.accept()
            if not os.fork():
                listening.close()
                answer(client)
            client.close()


def answer(client: socket.socket) -> None:
    """Run one client's command in a process of its own, with the client's words, folder, environment and streams."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, descriptors, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile("rb") as file:
        words, folder, environment = json.loads(file.read())
    process = os.fork()
    if not process:
        client.close()
        for ours, theirs in enumerate(descriptors):
            os.dup2(theirs, ours)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.path.insert(0, folder)
        run(words)
    _, code, used = os.wait4(process, 0)
    print(f"{used.ru_utime + used.ru_stime:.1f} s of CPU:", *words, file=sys.stderr, flush=True)
    status = os.waitstatus_to_exitcode(code)
    client.sendall(b"%d" % (status if status >= 0 else 128 - status))
    os._exit(0)


def run(words: list[str]) -> None:
    """The command itself, as `python -m` would run it, with its caps; or only parsed, where it is not to be run."""
    from readme_blocks import command_of, parse

    command = command_of(words)
    assert command
    if any(" ".join(words).startswith(phrase) for phrase in NOT_RUN):
        parse(command)
        print("parsed alone:", *words)
        sys.exit(0)
    name = "distmeta.cli" if words[0] == "distmeta" else words[2]
    command = capped(command)
    print("$", *command, flush=True)
    sys.argv[1:] = command if words[0] == "distmeta" else command[1:]
    if words[0] == "distmeta":
        importlib.import_module(name).console()
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    serve(sys.argv[1])
