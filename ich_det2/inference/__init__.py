"""From files on disk to a diagnosis."""
