"""Locks between processes, on files."""

from __future__ import annotations

import errno
import sys

__all__ = ["try_to_lock"]

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})

if sys.platform == "win32":
    import msvcrt

    def try_to_lock(descriptor: int) -> bool:
        """Lock an open file for this process alone, if no other has; closing it ends the lock."""
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def try_to_lock(descriptor: int) -> bool:
        """Lock an open file for this process alone, if no other has; closing it ends the lock."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            # Some network file systems have no locks. Files appear whole all the same: at worst, work is done twice.
            if error.errno not in _NO_LOCKS:
                raise
        return True
