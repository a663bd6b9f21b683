"""The stage `reference` alone: `ray job submit ... -- python jobs/reference.py --config FILE --run-dir DIR`."""

import sys

from jpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["reference", *sys.argv[1:]]))
