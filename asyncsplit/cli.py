"""The command line: picks a command and hands it the remaining arguments."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from asyncsplit import __version__

# Imported on use, since a command may need an extra, which has its name.
_COMMANDS = {
    "dashboards": ("asyncsplit.telemetry.export", "write dashboards and alerts to a folder"),
    "demo": ("asyncsplit.demo", "feed a handful of async workers and watch the data plane"),
    "top": ("asyncsplit.telemetry.top", "watch the split datasets of this node, live"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="asyncsplit",
        description="Feed async training loops from Ray Data.",
        epilog="\n".join(["commands:", *(f"  {n:<12}{h}" for n, (_, h) in _COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", choices=_COMMANDS, metavar="command", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed to the command")
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help(sys.stderr)
        parser.exit(2)
    args = parser.parse_args(argv)

    module, _ = _COMMANDS[args.command]
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == __package__:
            raise
        print(
            f"asyncsplit {args.command} needs {error.name}:"
            f" pip install 'asyncsplit[{args.command}]'",
            file=sys.stderr,
        )
        return 2
    return command.main(args.arguments) or 0
