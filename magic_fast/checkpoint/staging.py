"""A hidden folder beside the output, held by one run, that becomes the output in one rename."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress

from magic_fast.errors import OutputError

from .fs import REAL, FileSystem
from .io_errors import writing
from .lock import OutputLock


class Staging:
    """``.OUT.partial/`` and its lock ``.OUT.partial.lock``, until `commit` or `abandon`.

    The lock file is there whenever the folder is, so that a folder without one is known to be
    somebody else's.

    Raises:
        OutputError: OUT is in the way, another run holds the lock, or the folder cannot be made.
    """

    def __init__(self, path: str, *, resume: bool, fs: FileSystem) -> None:
        self.path = os.path.realpath(os.path.expanduser(path))
        self.is_file = self.path.endswith(".safetensors")
        self.parent, self.name = os.path.split(self.path)
        self.partial = os.path.join(self.parent, f".{self.name}.partial")
        self._fs = fs
        self._refuse_existing()
        with writing(self.partial, self.parent, fs):
            os.makedirs(self.parent, exist_ok=True)
            lock_path = self.partial + ".lock"
            ours = os.path.lexists(lock_path)
            self._lock = OutputLock(lock_path, self.path, fs=fs)
        try:
            self._refuse_existing()  # again: the run that held the lock may have finished
            with writing(self.partial, self.parent, fs):
                self.resumed = self._prepare(ours, resume)
        except BaseException:
            # A lock file beside somebody else's folder would make it look like ours next time.
            self._lock.release(remove=not ours or not os.path.lexists(self.partial))
            raise
        self.is_open = True

    def commit(self) -> None:
        """Rename to OUT and force that to the disk.

        Raises:
            OutputError: OUT came into being in the meantime, or the rename failed: nothing changed.
                Or only forcing it to the disk failed: OUT is there, whole.
        """
        self._refuse_existing()
        source = os.path.join(self.partial, self.name) if self.is_file else self.partial
        with writing(self.path, self.parent, self._fs):
            self._fs.rename(source, self.path)
        self.is_open = False
        try:
            with writing(self.path, self.parent, self._fs):
                self._fs.fsync_path(self.parent)
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)  # only a single file leaves one behind
            self._lock.release(remove=True)

    def abandon(self, *, keep: bool) -> None:
        """Remove the folder, or ``keep`` it for a later run; let others in. Again is harmless."""
        if not self.is_open:
            return
        self.is_open = False
        if not keep:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.release(remove=not os.path.lexists(self.partial))

    @staticmethod
    def clear(path: str, fs: FileSystem = REAL) -> None:
        """Removes what a run that was killed right after its last rename left beside a finished
        OUT: its lock file, and the emptied folder where OUT is a single file. Does nothing where
        another run holds the lock."""
        own = os.path.realpath(os.path.expanduser(path))
        parent, name = os.path.split(own)
        partial = os.path.join(parent, f".{name}.partial")
        if not os.path.lexists(partial + ".lock"):
            return
        with suppress(OutputError), writing(own, parent, fs):
            lock = OutputLock(partial + ".lock", own, fs=fs)
            shutil.rmtree(partial, ignore_errors=True)
            lock.release(remove=True)

    def _prepare(self, ours: bool, resume: bool) -> bool:
        """Make an empty partial folder, or with ``resume`` take over an earlier run's (True)."""
        if os.path.lexists(self.partial):
            real = os.path.isdir(self.partial) and not os.path.islink(self.partial)
            if not real or (not ours and os.listdir(self.partial)):
                raise OutputError(
                    f"Unknown folder in the way for {self.path}: expected {self.partial} to be "
                    "absent or left by an earlier run, got something without that run's lock "
                    "file. Remove it, or choose another output."
                )
            if resume and os.listdir(self.partial):
                return True
            shutil.rmtree(self.partial)
        os.mkdir(self.partial)
        return False

    def _refuse_existing(self) -> None:
        if not os.path.lexists(self.path):
            return
        if self.is_file or not os.path.isdir(self.path):
            raise OutputError(
                f"Output exists for {self.path}: expected nothing there, got a file or folder. "
                "Remove it, or choose another output."
            )
        if os.path.ismount(self.path):
            raise OutputError(
                f"Output is a mount point for {self.path}: expected a folder that can be renamed, "
                "got the root of a file system. Choose a folder inside it."
            )
        with writing(self.path, self.parent, self._fs):
            names = sorted(os.listdir(self.path))
        if names:
            listed = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            raise OutputError(
                f"Output folder not empty for {self.path}: expected a new or empty folder, got "
                f"{len(names)} entries ({listed}). Remove them, or choose another output."
            )
