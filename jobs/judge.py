"""The stage `judge` alone: `ray job submit ... -- python jobs/judge.py --config FILE --run-dir DIR`."""

import sys

from jpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["judge", *sys.argv[1:]]))
