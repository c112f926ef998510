"""What the report has found so far: one JSON object a line, on disk as soon as it is known."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Journal:
    """A file of records that several processes append to, and that survives whichever of them is ended.

    Args:
        path: The file, which need not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self._records: list[Record] = []
        self._read = 0  # bytes

    def append(self, record: Record) -> None:
        """Write a record, and wait until the disk has it."""
        line = json.dumps(record) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)

    def read(self) -> Sequence[Record]:
        """All records, but for a last line that is not there in full."""
        if self.path.exists() and self.path.stat().st_size > self._read:
            with self.path.open("rb") as file:
                file.seek(self._read)
                lines = file.read().rpartition(b"\n")[0]
            self._read += len(lines) + bool(lines)
            self._records += map(json.loads, lines.splitlines())
        return self._records


def results(records: Sequence[Record], stage: str) -> Iterator[tuple[str, Record]]:
    """Name and result of each case of a stage that has one."""
    for record in records:
        if record.get("stage") == stage and "result" in record:
            yield record["case"], record["result"]


def failures(records: Sequence[Record], stage: str) -> Iterator[tuple[str, str]]:
    """Name of each case of a stage that has no result, and why."""
    for record in records:
        if record.get("stage") == stage and "error" in record:
            yield record["case"], record["error"]


def find_result(records: Sequence[Record], stage: str, case: str) -> Record | None:
    """The result of one case, None if there is none."""
    return dict(results(records, stage)).get(case)
