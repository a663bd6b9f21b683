"""The stage `items` alone: `ray job submit ... -- python jobs/items.py --config FILE --run-dir DIR`."""

import sys

from jpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["items", *sys.argv[1:]]))
