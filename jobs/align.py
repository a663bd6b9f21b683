"""The whole pipeline: `ray job submit ... -- python jobs/align.py --config FILE --run-dir DIR [section.key=value]`."""

import sys

from jpo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
