"""Whether a file of torch.save is as it was written: by the sum that seals ours, else by the sums of its zip members.

torch.load checks neither, and reads some damaged files as other weights. Files in torch's format from before 1.6 and
safetensors hold no sums.
"""

import hashlib
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import BinaryIO

# A zip archive ends with a record of 22 bytes, whose last two are the length of the comment that follows it.
START, END, END_SIZE = b"PK\x03\x04", b"PK\x05\x06", 22
# The comment of a sealed file is a sum of all before that length.
DIGEST = hashlib.sha256().digest_size
NO_COMMENT, SEALED = (length.to_bytes(2, "little") for length in (0, DIGEST))
LONGEST = END_SIZE + 2**16 - 1
MANY = 2**16 - 1  # in place of a number of members that two bytes do not hold
FOLDER = 0x10  # in the attributes of a member
BLOCK = 2**24


def seal(file: BinaryIO) -> None:
    """Make a sum over a file that torch.save has written the comment that ends this zip archive."""
    size = file.seek(-len(NO_COMMENT), os.SEEK_END)
    digest = _digest(file, size)
    file.seek(size)
    file.write(SEALED + digest)


def find_damage(path: Path) -> str | None:
    """What is wrong with a file, None where nothing is or nothing can be seen; its bytes are read once.

    A zip archive is damaged when it does not end as one, has changed since it was sealed, has a member that has
    changed (where there is no seal), or two members of one name.
    """
    with path.open("rb") as file:
        begins = file.read(len(START)) == START
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - LONGEST, 0))
        end = _end_of_archive(file.read())
        if end is None:
            return "it does not end as a zip archive does" if begins else None
        members, comment = end
        sealed = len(comment) == DIGEST
        if sealed and comment != _digest(file, size - len(SEALED) - DIGEST):
            return "it has changed since it was written"
        try:
            return _damaged_member(file, members, with_content=not sealed)
        except Exception as e:  # zipfile raises anything for damaged headers
            return f"as a zip archive it cannot be read: {e}"


def _end_of_archive(tail: bytes) -> tuple[int, bytes] | None:
    """The number of members and the comment of a zip archive that ends with these bytes; None where none does."""
    start = tail.rfind(END)
    while start >= 0:
        record, comment = tail[start : start + END_SIZE], tail[start + END_SIZE :]
        if len(record) == END_SIZE and len(comment) == int.from_bytes(record[20:], "little"):
            return int.from_bytes(record[10:12], "little"), comment
        start = tail.rfind(END, 0, start)
    return None


def _damaged_member(file: BinaryIO, members: int, with_content: bool) -> str | None:
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        if members not in (len(infos), MANY):
            return f"it says to have {members} members, and lists {len(infos)}"
        counts = Counter(info.filename.lower() for info in infos)  # torch finds names whatever their case
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            return f"it has two members of the name {twice[0]}"
        for info in infos:  # of a folder torch reads nothing, and leaves the values what the memory held
            if info.external_attr & FOLDER and not info.is_dir():
                return f"its member {info.filename} is said to be a folder"
        for info in infos if with_content else ():
            read = 0
            with archive.open(info) as member:
                while block := member.read(BLOCK):  # compares the sum when it comes to the end
                    read += len(block)
            if read != info.file_size:
                return f"its member {info.filename} has {read} bytes, and should have {info.file_size}"
    return None


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the first `size` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (block := file.read(min(size, BLOCK))):
        digest.update(block)
        size -= len(block)
    return digest.digest()
