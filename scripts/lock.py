"""Writes a pip installation report (standard input) as a list of exact versions, for `make lock`."""

from __future__ import annotations

import argparse
import json
import sys


def pins(report: str) -> list[str]:
    """``name==version`` of everything that the report installs but the project itself, without local versions."""
    packages = (item["metadata"] for item in json.loads(report)["install"] if not item.get("is_direct"))
    return sorted(f"{package['name'].lower()}=={package['version'].partition('+')[0]}" for package in packages)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help, and no argument
    sys.stdout.write("# Exact versions for CI, by `make lock`; constraints, not requirements.\n")
    sys.stdout.write("".join(f"{pin}\n" for pin in pins(sys.stdin.read())))
