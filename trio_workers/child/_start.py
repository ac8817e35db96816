"""The first lines of a Python child, run as a script: `python _start.py RELAY,PACKETS,REGION,ARENA DIRECTORY`.

Not by `-c`: with that, from Python 3.13 on, the interpreter imports `linecache`, and what that needs, for itself while
the current directory is in front of the path.
"""

import sys

if __name__ == "__main__":
    # This directory goes first: nothing of it may be imported in place of the standard library. What the child needs of
    # that is loaded before the package's directory is, for a moment, in front.
    if not sys.flags.safe_path:
        del sys.path[0]
    for name in (
        "_pickle",
        "_signal",
        "_socket",
        "contextvars",
        "faulthandler",
        "io",
        "mmap",
        "os",
        "select",
        "struct",
        "time",
        "zlib",
    ):
        __import__(name)
    sys.path.insert(0, sys.argv[2])
    from trio_workers.child._functions import main

    del sys.path[0]
    for name in ("__file__", "__cached__"):
        globals().pop(name, None)  # it stands for a main module that has not been run, and is none to be run again
    main(*map(int, sys.argv[1].split(",")))
