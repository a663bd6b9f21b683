"""The lease of a run directory on an object store, which can neither link nor rename nor create on a condition.

Every run that wants the lease writes a claim under a name of its own, then lists all claims. It holds the lease if
there is no other living one, else it takes its claim back. Of two that come at once, the later writer sees the other's
claim, so never both hold it (both may give way). That needs lists that show what was written before: S3, GCS and Azure
promise it. Ages are told by the store's clock alone. A holder that slept past its expiry may go on for one heartbeat
after it wakes up; it finds its claim gone then, and stops.
"""

import json
from contextlib import suppress
from typing import Any

from jpo_ray import lease
from jpo_ray.errors import InputError
from jpo_ray.lease_holder import this_process
from jpo_ray.store import Store, StoreError

CLAIMS = "lease"


class StoreLease:
    """Claims below `lease/` in a run directory on an object store."""

    def __init__(self, store: Store) -> None:
        self.name = store.shown()
        self._store, self._owner = store, this_process()
        self._mine = f"{self._owner['token']}.json"
        self._dead: set[str] = set()  # claims that this one took over
        self._silent = False  # whether the store did not answer at last

    def acquire(self) -> None:
        """Raises `InputError` also where the store refuses to be written."""
        try:
            self._claim()
            times = self._store.times(CLAIMS)
            if self._mine not in times:
                raise lease.same_moment(self.name)
            now = times.pop(self._mine)
            for name, written in times.items():
                holder = self._holder(name)
                if holder is None:  # gone in the meantime
                    continue
                if not lease.is_dead(holder, (now - written).total_seconds()):
                    self.release()
                    raise lease.in_use(self.name, holder)
                self._store.delete(f"{CLAIMS}/{name}")
                self._dead.add(name)
        except StoreError as error:
            raise InputError(f"--run-dir {error}") from error

    def beat(self) -> None:
        self._silent = True
        names = self._store.times(CLAIMS).keys()
        for name in self._dead & names:  # of a holder that slept while it wrote
            self._store.delete(f"{CLAIMS}/{name}")
        if self._mine in names:
            self._claim()
        self._silent = False
        if self._mine not in names:
            raise lease.taken_over(self.name) if names - self._dead else lease.gone(self.name)

    def release(self) -> None:
        """A claim that cannot be taken back expires."""
        if not self._silent:
            with suppress(StoreError):
                self._store.delete(f"{CLAIMS}/{self._mine}")

    def _claim(self) -> None:
        self._store.write(f"{CLAIMS}/{self._mine}", json.dumps(self._owner).encode())

    def _holder(self, name: str) -> dict[str, Any] | None:
        content = self._store.read(f"{CLAIMS}/{name}")
        try:
            return None if content is None else dict(json.loads(content))
        except (ValueError, TypeError):  # damaged, or another program's
            return {}
