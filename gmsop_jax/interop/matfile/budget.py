"""Limits the memory that reading one file may take, since a few bytes of a hostile file can claim gigabytes."""

_FREE_BYTES = 2**27
_BYTES_PER_BYTE = 64  # compressed parameters and images expand by less than 2, but arrays of zeros by up to 1,000
_MAX_NODES = 1_000_000  # a checkpoint of the authors' largest network has some 20,000
_MAX_TEXT = 2**20


class Budget:
    """The memory and the number of objects that a file may still claim. Methods raise ValueError beyond a limit.

    Args:
      file_bytes: the size of the file.
    """

    def __init__(self, file_bytes: int):
        self.bytes = max(_FREE_BYTES, _BYTES_PER_BYTE * file_bytes)
        self._total = self.bytes
        self._nodes = _MAX_NODES

    def take_bytes(self, count: int) -> None:
        """Accounts for an array in memory."""
        self.bytes -= count
        if self.bytes < 0:
            raise ValueError(f"its arrays claim more than {self._total:,} bytes, too many for a file of its size")

    def take_nodes(self, count: int = 1) -> None:
        """Accounts for arrays, cells and fields of structs."""
        self._nodes -= count
        if self._nodes < 0:
            raise ValueError(f"it has more than {_MAX_NODES:,} cells and fields")

    def check_text(self, count: int) -> None:
        """Refuses text that is too long to be a name or a note."""
        if count > _MAX_TEXT:
            raise ValueError(f"it has a text of {count:,} characters")
