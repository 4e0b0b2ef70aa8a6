"""Named points between steps that must not be taken for one; tests kill the process there."""


def reach(name: str) -> None:
    """Does nothing.

    The points: ``received`` (the file is on disk, not in the journal), ``journaled`` (not yet
    acknowledged), ``detected`` (not yet written), ``stored`` (the answer is on disk, not in the
    journal), ``answered`` (in the journal, not yet sent), ``sent`` (not yet noted).
    """
