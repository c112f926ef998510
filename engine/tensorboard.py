"""TensorBoard's events, written at once: tensorboardX's own writer does it in a thread, whose errors nobody hears."""

import os
import socket
import struct
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import image, scalar
from torch import Tensor

from .outputs import writing


class EventFile:
    """A new file of events; what cannot be written, by any method, is a SaveError.

    Args:
        folder: Where, and it exists.
        epoch: Where the run begins: of this and later epochs, TensorBoard forgets what earlier files have.
    """

    def __init__(self, folder: str, epoch: int):
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self.path = Path(folder, name)
        with writing(self.path):
            self.file = self.path.open("wb")
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=epoch, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, name: str, value: float, epoch: int) -> None:
        """Add a figure of an epoch."""
        self._write(Event(step=epoch, summary=scalar(name, value)))

    def image(self, name: str, pixels: Tensor, epoch: int) -> None:
        """Add a picture of an epoch, (1 or 3, H, W) with values from 0 to 1."""
        self._write(Event(step=epoch, summary=image(name, pixels.cpu().numpy())))

    def flush(self) -> None:
        """Put on the disk what has been added."""
        with writing(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Flush, and add nothing more."""
        try:
            self.flush()
        finally:
            self.file.raw.close()  # without another attempt to write what could not be written

    def _write(self, event: Event) -> None:
        """Add a record of the TFRecord format: a length, its checksum, the event, and its checksum."""
        event.wall_time = time.time()
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        with writing(self.path):
            self.file.write(length + sums[0] + content + sums[1])
