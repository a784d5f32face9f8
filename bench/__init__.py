"""Benchmarks: `python -m bench.<name>`, one file per family. `_harness` measures, `_peers` competes."""
