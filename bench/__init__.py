"""The benchmarks. A family is a folder, and `python -m bench.FAMILY` runs it: see bench/common/run.py.

Each folder has the same files:

    workloads.py            what is computed: sizes, data, the arithmetic that it takes, the right results
    peers/                  how others compute it: pytorch.py, by_hand.py, in_jax.py, libraries.py
    cases.py                which workloads and variants stand beside each other, and what metafast aims at
    memory.py, scaling.py   how memory and time grow, where that matters
    __main__.py             names the family for bench/common/run.py

common/ is what they share. Two are a file each: training.py, a step of `metafast train` with all that belongs
to it, and overhead.py, the cost of a call. `python -m bench` runs all, in the order of FAMILIES, which a new
folder joins. methods.py, which trains the methods, takes hours and runs alone.
"""

import time

STARTED = time.perf_counter()  # before torch is imported: a budget of seconds counts that too
# The most important first.
FAMILIES = ("pairwise", "inner_loop", "learned_optimizer", "networks", "training", "overhead")
