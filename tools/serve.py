#!/usr/bin/env python
"""A node beside a PACS: receives head CT, diagnoses it, sends the answer back.

    python tools/serve.py run node.yaml          # until Ctrl-C or SIGTERM
    python tools/serve.py status node.yaml       # what is waiting, failed, answered and sent
    python tools/serve.py retry node.yaml        # what failed is tried at once
    python tools/serve.py reconcile node.yaml --date 20261127    # the PACS's studies of a day

An instance that was acknowledged is on disk and in the journal; its study ends as sent, or as
visibly failed with retries going on. docs/serving.md has the settings, what is exposed and what an
operator has to do. For research only, not for clinical use.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ich_det2.cli import guard


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("run", "serves until it is stopped"),
        ("status", "prints the studies that are not done, and counts of all"),
        ("retry", "lets everything that failed be tried at once"),
        ("reconcile", "compares the PACS's CT studies of a day with the journal"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=Path, metavar="CONFIG.yaml")
        if name == "status":
            command.add_argument("--all", action="store_true", help="studies that are done, too")
        if name in ("status", "reconcile"):
            command.add_argument("--uids", action="store_true", help="print Study Instance UIDs")
        if name == "reconcile":
            today = time.strftime("%Y%m%d")
            command.add_argument("--date", default=today, help=f"YYYYMMDD (default {today})")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for an error of the user, 1 where reconciling
    finds a study that the journal lacks."""
    args = parse_args(argv)
    left = "what was acknowledged is in the journal, and the same command goes on with it."
    return guard("serve.py", lambda: COMMANDS[args.command](args), interrupted=left)


def run(args: argparse.Namespace) -> int:
    from ich_det2.serve.config import read_config
    from ich_det2.serve.log import log_as_json
    from ich_det2.serve.node import Node, load_model

    cfg = read_config(args.config)
    log_as_json()
    node = Node(cfg, load_model(cfg))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: node.stop())
    node.run()
    return 0


def open_journal(args: argparse.Namespace):
    """The settings, and the journal of a node that has run."""
    from ich_det2.serve.config import read_config
    from ich_det2.serve.journal import Journal

    cfg = read_config(args.config)
    path = cfg.root / "journal.sqlite"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the node has not run yet.")
    return cfg, Journal(path)


def status(args: argparse.Namespace) -> int:
    from ich_det2.serve.journal import STATES
    from ich_det2.serve.log import study_key

    _, journal = open_journal(args)
    console, totals = Console(), journal.totals()
    counts = ", ".join(f"{totals[f'studies_{state}']:.0f} {state}" for state in STATES)
    waiting = f"{totals['deliveries_waiting']:.0f} objects to be sent"
    say = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print(f"Studies: {counts}; {waiting}", **say)
    there = journal.count_instances()
    table = Table("study", "state", "instances", "expected", "verdict", "attempts", "next try")
    for s in journal.studies():
        if s.state == "sent" and not args.all:
            continue
        wait = s.next_at - time.time()
        table.add_row(
            s.uid if args.uids else study_key(s.uid),
            s.state,
            str(there.get(s.uid, 0)),
            "" if s.expected is None else str(s.expected),
            s.verdict + ("" if s.complete or not s.verdict else ", incomplete"),
            str(s.attempts or ""),
            f"in {wait:.0f} s" if wait > 0 else "",
        )
    if table.row_count:
        console.print(table)
    for study, destination, error, attempts in journal.errors():
        what = f"not sent to {destination}" if destination else "not diagnosed"
        console.print(f"{study_key(study)}: {what} ({attempts} tries): {error}", **say)
    return 0


def retry(args: argparse.Namespace) -> int:
    _, journal = open_journal(args)
    print(f"{journal.retry()} failed studies and sendings are tried at once, if the node runs.")
    return 0


def reconcile(args: argparse.Namespace) -> int:
    from ich_det2.serve.dicomweb import Dicomweb
    from ich_det2.serve.log import study_key

    cfg, journal = open_journal(args)
    if not cfg.complete.qido:
        raise ValueError(f"{args.config}: complete.qido is missing; it names the PACS to ask.")
    if not (len(args.date) == 8 and args.date.isdigit()):
        raise ValueError(f"--date is {args.date!r}, expected YYYYMMDD.")
    source = Dicomweb(cfg.complete.qido, ca=cfg.complete.ca, token_file=cfg.complete.token_file)
    there, n_known, lacking = journal.count_instances(), 0, []
    for uid in source.studies_of(args.date):
        n_known += 1
        study, expected = journal.study(uid), source.count_instances(uid)
        own = there.get(uid, 0)
        whole = study is not None and (study.removed or own >= (expected or 0))
        if not whole or study.state == "failed":
            state = "not received" if study is None else study.state
            shown = "unknown" if expected is None else expected
            lacking.append((uid if args.uids else study_key(uid), state, own, shown))
    table = Table("study", "state", "CT images here", "in the PACS")
    for row in lacking:
        table.add_row(*map(str, row))
    if lacking:
        Console().print(table)
    print(
        f"{n_known} CT studies of {args.date} in the PACS, {len(lacking)} of them not whole here."
    )
    return 1 if lacking else 0


COMMANDS = {"run": run, "status": status, "retry": retry, "reconcile": reconcile}


if __name__ == "__main__":
    sys.exit(main())
