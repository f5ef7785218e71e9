"""Pure state of a split: imports neither ray nor asyncio."""
