"""The work directory beside an output: `manifest.json`, which stays, and while the job is unfinished a journal and a lock.

Whatever moment a process dies at, what it leaves is one of: nothing, a manifest without a journal (begun), both
(unfinished: the next start resumes), or a finished manifest beside a whole output. A job that replaces another one keeps
its own apart (`journal.new`) until it has work to keep, so that what cannot run costs nothing that is there.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from pathlib import Path

from flexmoe.errors import DataError, StorageError, UsageError
from flexmoe.job.journal import Journal
from flexmoe.job.manifest import Finished, Manifest, work_directory
from flexmoe.job.output_files import is_as_published, remove, remove_temporaries
from flexmoe.system.lock import Lock
from policies.common import file_io
from policies.common.file_io import storage_errors
from policies.common.option_names import option

log = logging.getLogger(__name__)


class Workspace:
    """Holds the job of one output file.

    Args:
        output, errors: the final files.
        wanted: the job that is asked for.
        overwrite: start a new job, whatever is there; the old output is kept until the new job has made progress. An unfinished
            job that was itself begun with ``overwrite`` is resumed: the same command again is no wish to start anew.

    Attributes:
        manifest: that of the job; its creation time is that of the first start.
        finished: what is there already; None when there is work to do.

    Raises:
        UsageError: another run holds it, it holds a job with other flags, or the output is there and is not this job's.
        DataError: it holds a job with other files, or is damaged.
        StorageError: it cannot be made or written.
    """

    def __init__(self, output: Path, errors: Path, wanted: Manifest, *, overwrite: bool = False) -> None:
        self.directory = work_directory(output)
        self._output, self._errors = output, errors
        with storage_errors(self.directory):
            self.directory.mkdir(exist_ok=True)
        self._manifest_path, self._journal_path = self.directory / "manifest.json", self.directory / "journal"
        self._apart_path = self.directory / "journal.new"
        self._lock = Lock(self.directory / "lock")
        self._journal: Journal | None = None
        self._is_new, self._is_begun, self.manifest = False, True, wanted
        try:
            for path in (output, errors, self._manifest_path):
                remove_temporaries(path)
            remove(self._apart_path)
            self.manifest = self._begun_so_or_new(wanted) if overwrite else self._same_or_new(wanted)
        except BaseException:
            self.close()
            raise

    @property
    def finished(self) -> Finished | None:
        """What the finished job left; None when there is work to do."""
        return self.manifest.finished

    @property
    def journal(self) -> Journal:
        """The journal, opened (and repaired) when it is first asked for.

        Raises:
            DataError, StorageError: as `Journal`.
        """
        if self._journal is None:
            path = self._journal_path if self._is_begun else self._apart_path
            self._journal = Journal(path, self.manifest.rows, self.manifest.part, self.begin)
            with storage_errors(self.directory):
                file_io.sync_directory(self.directory)
        return self._journal

    def begin(self) -> None:
        """Removes what the job replaces; the journal calls it once work has been kept. A second call does nothing.

        Raises:
            StorageError: the disk is full or failed.
        """
        if self._is_begun:
            return
        # In this order no moment has the journal of one job beside the manifest of another.
        remove(self._journal_path)
        self.manifest.save(self._manifest_path)
        if self._journal is not None:
            self._journal.rename(self._journal_path)
        self._is_begun = True

    def finish(self, finished: Finished) -> None:
        """Writes down that the output of a job that has begun has its name, and removes the journal.

        Raises:
            StorageError: the disk is full or failed; the next start publishes the same files again.
        """
        self.manifest = replace(self.manifest, finished=finished)
        self.manifest.save(self._manifest_path)
        self._close_journal()
        remove(self._journal_path)

    def close(self) -> None:
        """Releases the directory. A job in which nothing was done leaves nothing: its flags may be others next time."""
        untouched = self._is_new if self._journal is None else self._journal.is_untouched
        self._close_journal()
        with contextlib.suppress(StorageError):
            remove(self._apart_path)
            if untouched and self._is_begun and self.finished is None:
                self._remove_job()
        self._lock.release()
        with contextlib.suppress(OSError):  # it is not empty, as a rule
            self.directory.rmdir()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begun_so_or_new(self, wanted: Manifest) -> Manifest:
        """With `overwrite`."""
        with contextlib.suppress(DataError):  # a damaged manifest is replaced as any other
            held = Manifest.load(self._manifest_path)
            if held is not None and held.replaces and held.finished is None and held.part == wanted.part:
                log.warning(
                    "resuming what %s began here before; remove %s to start anew once more",
                    option("overwrite", True),
                    self.directory,
                )
                self._warn_of_other_versions(held, wanted)
                return held
        self._is_new, self._is_begun = True, False
        return replace(wanted, replaces=True)

    def _same_or_new(self, wanted: Manifest) -> Manifest:
        held = Manifest.load(self._manifest_path)
        if held is not None and held.part != wanted.part and self._is_untouched(held):
            self._remove_job()
            held = None
        if held is not None:
            held.check_same(wanted, self.directory)
            if held.finished is None:
                self._warn_of_other_versions(held, wanted)
                return held
            if self._is_whole(held.finished):
                remove(self._journal_path)  # there still, where the process was killed in between
                return held
            log.warning("%s is gone, so its job, which was finished, is done again", self._output)
            self._remove_job()
        else:
            self._refuse_files_of_others()
        self._is_new = True
        wanted.save(self._manifest_path)
        return wanted

    def _is_untouched(self, held: Manifest) -> bool:
        """Whether another job was begun here and killed before it had done anything."""
        if held.finished is not None:
            return False
        with contextlib.closing(Journal(self._journal_path, held.rows, held.part)) as journal:
            return journal.is_untouched

    def _warn_of_other_versions(self, held: Manifest, wanted: Manifest) -> None:
        """They may round otherwise, or draw otherwise; a job is not lost for that."""
        names = [name for name, version in wanted.versions.items() if held.versions.get(name) != version]
        if names:
            changed = ", ".join(f"{name} {held.versions.get(name)} (now {wanted.versions[name]})" for name in names)
            log.warning(
                "%s was begun with %s; the rows that are left may differ from what they would have been",
                self._output,
                changed,
            )

    def _remove_job(self) -> None:
        remove(self._journal_path)
        remove(self._manifest_path)

    def _is_whole(self, finished: Finished) -> bool:
        """Whether the finished job's files are there; the work is done again only where the output was taken away."""
        if not self._output.exists():
            return False
        for path, published in ((self._output, finished.output), (self._errors, finished.errors)):
            if published is not None and not is_as_published(path, published):
                raise UsageError(
                    f"{path} is not as the finished job left it; remove {self._output} or give "
                    f"{option('overwrite', True)} to do the job again, or choose another output"
                )
        return True

    def _refuse_files_of_others(self) -> None:
        for path in (self._output, self._errors):
            if path.exists():
                raise UsageError(
                    f"{path} is there already and was not begun by this job; choose another output, or give "
                    f"{option('overwrite', True)} to replace it"
                )

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
