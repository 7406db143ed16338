"""The real daemon against its own description: schemathesis asks for what the document allows and
for what it does not, and holds every answer to it. Prints what it found, and exits with 1 then.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import Daemon

KEY = "key-of-the-fuzzer"
POLICY = """
[safety.rules]
noted = { patterns = ['[0e]'] }
replaced = { patterns = ['[1-9A-Z]'] }
refused = { patterns = ['[\\x{80}-\\x{ff}]|z'] }
[safety.policies.all]
input = { noted = "annotate", replaced = "redact", refused = "block" }
output = { noted = "annotate", replaced = "redact", refused = "block" }
"""
"""Finds something in most of what schemathesis makes up, and in most answers."""
FILTERED = "^/(v1/(chat|comp|resp|mess|mod|emb|rerank)|api/(chat|gen|emb))"
"""Where a policy has a say."""


def run(document: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`document`: a URL or a file."""
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [
                *(sys.executable, "-m", "schemathesis.cli", "run", document, "--no-color"),
                *("--header", f"Authorization: Bearer {KEY}", "--warnings", "off"),
                # What is right in itself may be too long for the model, or not what it is for.
                *("--exclude-checks", "positive_data_acceptance"),
                # What Ollama does and this server does not: all of it is a 501.
                *("--exclude-path-regex", "^/api/(pull|push|create|copy|delete|blobs)"),
                # A busy machine is no failure: by default a request has ten seconds.
                *("--request-timeout", "240"),
                *("--continue-on-failure", "--generation-database", "none", *options),
            ],
            cwd=folder,
            env=os.environ
            | {"SCHEMATHESIS_HOOKS": "openapi_hooks", "PYTHONPATH": str(Path(__file__).parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def serve(folder: Path, configuration: str = "") -> Daemon:
    """With a short context, so that nothing that is let through runs for long, and with a key, so
    that its absence is tried as well."""
    keys = folder / "keys"
    keys.write_text(f"fuzzer:{KEY}\n")
    (folder / "config.toml").write_text(configuration)
    return Daemon(
        *("demo", "--dtype", "float32", "--threads", "1", "--max-context", "64"),
        *("--api-keys-file", str(keys), "--config", str(folder / "config.toml")),
        folder=folder,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="of each operation")
    parser.add_argument("--filtered", action="store_true", help="under a safety policy")
    arguments = parser.parse_args()
    chosen = ("--include-path-regex", FILTERED) if arguments.filtered else ()
    options = ("--max-examples", str(arguments.examples), *chosen)
    with tempfile.TemporaryDirectory(prefix="quantd-fuzz-") as folder:
        with serve(Path(folder), POLICY if arguments.filtered else "") as daemon:
            done = run(f"{daemon.url}/openapi.json", *options)
            print(done.stdout)
            log = daemon.said()
            assert "Traceback" not in log and '"level":"error"' not in log, log[-4000:]
            return done.returncode


if __name__ == "__main__":
    sys.exit(main())
