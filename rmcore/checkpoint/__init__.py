"""Checkpoints: sharded, hashed, without pickle; a run can resume from them on any number of ranks.

state.py      which part of which tensor this rank holds; its copy in host memory
shards.py     one safetensors file per rank, hashed while it is written; reads the needed parts of such files
manifest.py   manifest.json: the position and settings of the run, and the size and hash of each file
directory.py  names on disk: begin, commit, retire, quarantine, sweep
resume.py     which checkpoint to continue from
changes.py    which settings may have changed since then

rmcore/training/saver.py decides when to save, and writes checkpoints in a thread.
"""
