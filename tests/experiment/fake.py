"""A runner of experiments with a small script in the place of every program: what it does is told
by behave.json.

    install(folder)                    patches the runner in this process
    python fake.py runner FOLDER ...   `rlhf experiment run ...` with the patches, in a process of its own
    python fake.py program FOLDER JOB LEAVES...    the script; FOLDER/log has a line for whatever happens

behave.json: {job: {"exit": [codes, one for each start], "seconds": 0.2, "nothing": true, "stopped":
"why", "launch": "rank" or "slowly" or "crash"}}; a code below 0 is a signal to itself; "" stands
for all other jobs.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def say(folder: Path, text: str) -> None:
    with open(folder / "log", "a") as log:
        log.write(f"{text}\n")


def program(folder: Path, name: str, leaves: list[Path]) -> int:
    told = json.loads((folder / "behave.json").read_text())
    told = told.get(name, told.get("", {}))
    if told.get("launch") and "LOCAL_RANK" not in os.environ:
        return launcher(folder, name, told)
    starts = (
        (folder / "log").read_text().splitlines().count(f"begin {name}")
        if (folder / "log").exists()
        else 0
    )
    own = folder / f"{name.replace('/', '+')}.lock"
    with open(own, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(folder, f"clash {name}")
        if all(map(whole, leaves)) and leaves[0].suffix == ".json":
            say(folder, f"finished already {name}")
            return 0
        say(folder, f"begin {name}")

        def save(number, frame):
            say(folder, f"saved {name}")
            os._exit(75)

        signal.signal(signal.SIGTERM, save)
        time.sleep(told.get("seconds", 0.0))
        codes = told.get("exit", [])
        code = codes[min(starts, len(codes) - 1)] if codes else 0
        if code < 0:
            os.kill(os.getpid(), -code)
        if code in (0, 3) or told.get("stopped"):
            for leaf in leaves if not told.get("nothing") else []:
                write(leaf, name, told)
            say(folder, f"end {name}")
        return code


def write(leaf: Path, name: str, told: dict) -> None:
    leaf.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("pilot/"):  # a step costs 10
        rows = [{"step": step, "budget/flops": 10 * step} for step in range(1, 9)]
        (leaf.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = json.dumps(
        {"finished": "now"} | ({"stopped": told["stopped"]} if "stopped" in told else {})
    )
    if leaf.suffix == ".db":
        return leaf.touch()
    beside = leaf.with_suffix(f".{os.getpid()}")
    beside.write_text(text)
    os.replace(beside, leaf)


def whole(leaf: Path) -> bool:
    try:
        return leaf.suffix != ".json" or bool(json.loads(leaf.read_text()).get("finished"))
    except (OSError, ValueError):
        return False


def launcher(folder: Path, name: str, told: dict) -> int:
    """As deepspeed's: it ends what it has launched when it is asked to end, and itself when that
    has ended.
    """
    if told["launch"] == "slowly":
        say(folder, f"launching {name}")
        time.sleep(2)
    child = subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, "LOCAL_RANK": "0"})

    def end(number, frame):
        child.kill()
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    if told["launch"] == "crash" and not (folder / "crashed").exists():
        (folder / "crashed").touch()
        while f"begin {name}" not in (
            (folder / "log").read_text() if (folder / "log").exists() else ""
        ):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    return child.wait()


def install(folder: Path, put=setattr) -> None:
    """Patch the runner: fake programs, no waiting, no report (a line in the log)."""
    import types

    import rlhf.experiment.check
    import rlhf.experiment.report
    import rlhf.jobs.commands
    import rlhf.jobs.runner

    def command(launcher, job):
        return [
            sys.executable,
            "-S",
            "-E",
            __file__,
            "program",
            str(folder),
            job.name,
            *job.outputs,
        ]

    quick = types.SimpleNamespace(
        monotonic=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 25)
    )
    put(rlhf.jobs.runner, "full_command", command)
    put(rlhf.jobs.runner, "time", quick)
    put(rlhf.jobs.commands, "time", quick)
    put(rlhf.jobs.runner, "code_version", lambda: {})
    put(rlhf.experiment.check, "check_starts", lambda *_: None)
    put(rlhf.experiment.report, "write_report", lambda config, out, *more: say(folder, "report"))


if __name__ == "__main__":
    kind, folder, *words = sys.argv[1:]
    if kind == "program":
        sys.exit(program(Path(folder), words[0], [Path(word) for word in words[1:]]))
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)
    from rlhf.cli import main

    install(Path(folder))
    main(["experiment", "run", *words])
