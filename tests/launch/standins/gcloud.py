"""Plays gcloud: notes every call, keeps one TPU in a folder, and does to it what a script says.

The folder (STANDIN) has `calls` (a JSON list a line), `state` (of the TPU, if there is one) and
`script`, a table: "create" has exit codes, "describe" states or "unreachable", "install" and "ssh"
exit codes, "preempted" (takes the TPU away) or "slow". A list that is used up goes on with what is
normal. Where the folder has `home`, that of a host, the job's script is run there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

folder = Path(os.environ["STANDIN"])
words = sys.argv[1:]
verb, state, script = words[3], folder / "state", folder / "script"
told = json.loads(script.read_text()) if script.exists() else {}
is_install = any("uv pip install" in word for word in words)
key = "install" if is_install else verb
answer = told.get(key, []).pop(0) if told.get(key) else None
script.write_text(json.dumps(told))
# Last, for whoever sees the call may end this process.
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\n")

if verb == "create":
    if answer:
        sys.exit(answer)
    assert not state.exists(), "there is one of that name"
    state.write_text("READY" if words[2] == "tpu-vm" else "ACTIVE")
elif verb == "describe":
    if answer == "unreachable":
        print("ERROR: the network is unreachable", file=sys.stderr)
        sys.exit(1)
    if not state.exists():
        print("ERROR: (gcloud) NOT_FOUND: Resource was not found", file=sys.stderr)
        sys.exit(1)
    print(answer or state.read_text())
elif verb == "delete":
    state.unlink()
elif answer == "preempted":
    state.write_text("PREEMPTED")
    sys.exit(255)
elif answer == "slow":
    time.sleep(60)
elif answer:
    sys.exit(answer)
elif key == "ssh" and (folder / "home").exists():
    (command,) = (w.removeprefix("--command=") for w in words if w.startswith("--command="))
    sys.exit(subprocess.run(["bash", "-c", command], cwd=folder / "home").returncode)
