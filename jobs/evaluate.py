"""The stage `evaluate` alone: `ray job submit ... -- python jobs/evaluate.py --config FILE --run-dir DIR`."""

import sys

from jpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
