"""`python setup.py install|develop|bdist_wheel`, as some tools still call it: pip on the same CMake build."""

from __future__ import annotations

import subprocess
import sys

PIP = {
    "install": ["install", "."],
    "develop": ["install", "--editable", "."],
    "bdist_wheel": ["wheel", "--no-deps", "--wheel-dir", "dist", "."],
}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PIP:
        sys.exit(f"usage: python setup.py {'|'.join(PIP)}")
    verb, *arguments = PIP[sys.argv[1]]
    sys.exit(subprocess.call([sys.executable, "-m", "pip", verb, "--no-build-isolation", *arguments]))
