"""The networks that are compared: as written, and as fcjax makes them."""

from __future__ import annotations

import types

import fcjax
from fcjax.planning.plan import always_fold


def plain(f, p, args):
    """The network as written."""
    return types.SimpleNamespace(apply=f, params=p, expand=lambda q: q)


def planned(f, p, args):
    fc = fcjax.front_contribute(f, p, *args)
    return types.SimpleNamespace(apply=fc.apply, params=fc.params, expand=fc.expand)


def merged(f, p, args):
    found = fcjax.merge(f, p, *args)
    return types.SimpleNamespace(apply=found.apply, params=found.params)


def optimized(optimizer):
    """Front contribution for an optimizer, which may remove weights."""

    def make(f, p, args):
        fc = fcjax.front_contribute(f, p, *args, optimizer=optimizer)
        return types.SimpleNamespace(apply=fc.apply, params=fc.params, expand=fc.expand)

    return make


def forced(make):
    """The same with every rewrite that can be represented."""

    def made(f, p, args):
        with always_fold():
            found = make(f, p, args)
        apply = found.apply

        def always(*given):
            with always_fold():
                return apply(*given)

        found.apply = always
        return found

    return made
