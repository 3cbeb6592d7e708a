"""Inside the locked room of locked.sh: starts the daemon, asks it, and says what it was denied.

python in_locked.py PREFIX FOLDER
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PR_SET_MDWE, REFUSE_EXEC_GAIN = 65, 1
prefix, folder = map(Path, sys.argv[1:])
URL = "http://127.0.0.1:8080"


def get(path: str, body: bytes | None = None) -> bytes:
    with urllib.request.urlopen(URL + path, body, timeout=10) as answer:
        return answer.read()


def writable(path: str) -> bool:
    try:
        (Path(path) / "x").touch()
    except OSError:
        return False
    return True


# As MemoryDenyWriteExecute=; children inherit it.
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_MDWE, REFUSE_EXEC_GAIN, 0, 0, 0) != 0:
    raise SystemExit(f"prctl: {os.strerror(ctypes.get_errno())}")
daemon = subprocess.Popen(
    [prefix / "bin" / "anomalyd", "serve", folder / "models"], stderr=subprocess.PIPE, text=True
)
for _ in range(300):
    try:
        get("/readyz")
        break
    except OSError:
        if daemon.poll() is not None:
            raise SystemExit(daemon.stderr.read()) from None
        time.sleep(0.1)
status = dict(
    line.split(":", 1) for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
)
result = json.loads(get("/v1/score", (folder / "boot.png").read_bytes()))["results"][0]
metrics = get("/metrics").decode().splitlines()
memory = next(line for line in metrics if line.startswith("process_resident_memory_bytes "))
daemon.send_signal(signal.SIGTERM)
places = ["/", "/tmp", "/var/tmp", "/root", "/dev/shm", str(folder), str(prefix), os.getcwd()]
found = {
    "result": result,
    "user": int(status["Uid"].split()[1]),
    "capabilities": int(status["CapBnd"], 16) | int(status["CapEff"], 16),
    "writable": [place for place in places if writable(place)],
    "memory": float(memory.split()[1]),
    "exit": daemon.wait(30),
}
print(json.dumps(found))
