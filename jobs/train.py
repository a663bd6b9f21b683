"""The stage `train` alone: `ray job submit ... -- python jobs/train.py --config FILE --run-dir DIR`."""

import sys

from jpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
