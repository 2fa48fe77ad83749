"""Start ComfyUI's main.py as it would start by itself, and end when the process that started it is gone.

    python run_host.py <folder of ComfyUI>/main.py [arguments of ComfyUI]

The starter holds the other end of standard input: when it ends, however it ends, reading returns and this ends too.
"""

import os
import runpy
import sys
import threading


def _end_with_the_starter():
    while os.read(0, 1):  # Not sys.stdin: its lock, held by this thread, would abort the interpreter's own end.
        pass
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_starter, daemon=True).start()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
