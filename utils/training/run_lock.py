"""One process group at a time trains in a run's folder."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from utils.training.checkpoint_files import CheckpointError

NAME = "lock"


def lock_run(folder: Path) -> TextIO:
    """Locks a run's folder as long as the returned file is open; the kernel releases it with the process.

    The lock is the process's own: workers that outlive a killed run for a moment do not hold it.

    Raises:
        CheckpointError: if another process trains in this folder.
    """
    path = folder / NAME
    file = path.open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise CheckpointError(
            f"{folder} is in use by {holder}, which trains this run; wait for it or end it, or start another run with "
            "another --exp_name"
        ) from error
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
