"""Start quantd on its embedded model, ask it something, show the answer as it streams.

    python examples/first_answer.py          # what `make serve` runs
    python examples/first_answer.py --stop   # what `make stop` runs

The daemon goes on running in the background; a second call finds it. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HOST, PORT = "127.0.0.1", int(os.environ.get("PORT", "8420"))
STATE = Path(sys.prefix)
PID_FILE, LOG_FILE = STATE / "quantd.pid", STATE / "quantd.log"
QUESTION = "What is 17 + 25?"
START_SECONDS = 120


def get(path: str) -> int | None:
    """The status of a GET, or None when nobody listens."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def start() -> None:
    """Start the daemon in a session of its own, and wait until the model is awake."""
    command = [sys.executable, "-m", "quantd.daemon", "serve", "demo", "--port", str(PORT)]
    with LOG_FILE.open("ab") as log:
        daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    PID_FILE.write_text(str(daemon.pid))
    deadline = time.monotonic() + START_SECONDS
    while get("/ready") != 200:
        if daemon.poll() is not None:
            sys.exit(f"quantd ended with status {daemon.returncode}; see {LOG_FILE}")
        if time.monotonic() > deadline:
            sys.exit(f"quantd was not ready after {START_SECONDS} s; see {LOG_FILE}")
        time.sleep(0.05)


def ask(question: str) -> None:
    """Stream one chat completion to standard output."""
    connection = http.client.HTTPConnection(HOST, PORT, timeout=60)
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
    }
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        sys.exit(f"{response.status}: {response.read().decode()}")
    for line in response:
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
    print()


def stop() -> None:
    """End the daemon that `start` started; it drains first."""
    try:
        pid = int(PID_FILE.read_text())
        os.kill(pid, signal.SIGTERM)
    except (OSError, ValueError):
        print("quantd was not started from here")
    PID_FILE.unlink(missing_ok=True)


def main() -> None:
    if sys.argv[1:] == ["--stop"]:
        stop()
        return
    if get("/health") is None:
        start()
    print(f"you     {QUESTION}\nquantd  ", end="")
    ask(QUESTION)
    binaries = os.path.relpath(Path(sys.executable).parent)
    print(f"""
It listens on http://{HOST}:{PORT}/v1 (any OpenAI client). Talk to it: {binaries}/quantd run
Serve a checkpoint of yours: {binaries}/quantd serve PATH. Stop this one: make stop""")


if __name__ == "__main__":
    main()
