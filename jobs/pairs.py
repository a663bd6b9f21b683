"""The stage `pairs` alone: `ray job submit ... -- python jobs/pairs.py --config FILE --run-dir DIR`."""

import sys

from jpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["pairs", *sys.argv[1:]]))
