"""`python -m rmcore.inspect` is the command line of rmcore/inspect_data.py, as `rmcore inspect` is.

The folder has no __init__.py on purpose: so Python prefers the standard library's `inspect` where this folder's parent
is on the search path, as it is for `python rmcore/train.py`.
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("rmcore.inspect_data", run_name="__main__", alter_sys=True)
