"""The command ``python -m tests.fuzz``."""

from __future__ import annotations

import argparse
import time

from .. import conftest  # noqa: F401 (sets JAX up as for the tests)

COMMAND = "python -m tests.fuzz"


def parsed() -> argparse.Namespace:
    usage = f"{COMMAND} FAMILY [COUNT] [SEED], or {COMMAND} --all [COUNT] [SEED]"
    parser = argparse.ArgumentParser(usage=usage, description="Runs random programs.")
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="list the families")
    parser.add_argument("--all", action="store_true", help="run every family")
    parser.add_argument("--seconds", type=float, default=10.0, help="allowed for a plan (10)")
    parser.add_argument("--shrink", type=float, default=60.0, help="given to shrink one (60)")
    parser.add_argument("--show", type=int, default=1, help="programs printed of a kind (1)")
    return parser.parse_args()


def main() -> int:
    """Runs programs, prints a shrunk one of each kind of failure, and returns how many failed."""
    from .families import FAMILIES

    options = parsed()
    if options.list:
        print("\n".join(FAMILIES))
        return 0
    families = list(FAMILIES) if options.all else options.words[:1]
    given = [int(word) for word in options.words[not options.all :]]
    count, seed = [*given, *(200, 0)[len(given) :]]
    return sum(run(family, range(seed, seed + count), options) for family in families)


def run(family: str, seeds: range, options: argparse.Namespace) -> int:
    from .running import by_kind, failures, smallest

    begun = time.process_time()
    found = list(failures(family, seeds, options.seconds))
    spent = (time.process_time() - begun) / max(len(seeds), 1)
    bad = {one.seed for one in found}
    print(f"{family}: {len(seeds)} programs, {len(bad)} fail, {spent:.2f} s of processor time each")
    for kind, ones in by_kind(found).items():
        checks = ", ".join({one.failure.check.name: None for one in ones})
        listed = ", ".join(str(seed) for seed in sorted({one.seed for one in ones})[:8])
        print(f"  {len(ones):4d}  {kind} ({checks}; seeds {listed})")
    for ones in by_kind(found).values():
        for one in ones[: options.show]:
            print(f"\n# {'-' * 80}\n# {family}, {smallest(one, options.seconds, options.shrink)}")
    return len(bad)


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
