"""Fifty folders that lead, or try to lead, out of the one that adapters may come from."""

UP = ["..", "../..", "../store", "../store/..", "../../etc", "../run", "../run/train/jpo", "a/..", "a/../..", "./.."]
ELSEWHERE = ["/", "/etc", "/etc/passwd", "/proc/self", "/proc/self/cwd", "/dev/shm", "/tmp", "/root", "~", "~root"]
ODD = [".", "./", "~/.ssh", "..\\..\\etc", "%2e%2e/%2e%2e/etc", "..%2f..%2fetc", "....//....//etc", "..;/etc", "..\x00"]
FOREIGN = ["file:///etc", "s3://bucket/adapter", "hf://some/adapter", "https://host/adapter", "\\\\host\\share"]
LONG = ["x" * 300, "x/" * 2000, "../" * 1000, "../" * 40 + "etc/passwd", "a/../../../etc", "extra\x00/../.."]
TRAVERSALS = [
    *UP,
    *(f"/{path}" for path in UP[:5]),
    *(f"{path}/" for path in UP[:5]),
    *ELSEWHERE,
    *ODD,
    *FOREIGN,
    *LONG,
]
