"""The stage `sft` alone: `ray job submit ... -- python jobs/sft.py --config FILE --run-dir DIR`."""

import sys

from jpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
