"""What tests want to know of other processes."""

from pathlib import Path


def runs(pid: int) -> bool:
    """Tell whether a process has not ended yet; Ray can leave one that has unreaped for long."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")
