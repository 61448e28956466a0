"""The networks that are compared: as written, and as fcjax makes them."""

from __future__ import annotations

import functools
import types

import fcjax
from fcjax.planning.plan import always_fold


def plain(f, p, args):
    """The network as written."""
    return types.SimpleNamespace(apply=f, params=p, expand=lambda q: q)


def planned(f, p, args):
    fc = fcjax.front_contribute(f, p, *args)
    return types.SimpleNamespace(apply=fc.apply, params=fc.params, expand=fc.expand)


def always(fn):
    """The function with every rewrite forced."""

    @functools.wraps(fn)
    def forced(*args):
        with always_fold():
            return fn(*args)

    return forced


@always
def forced(f, p, args):
    fc = fcjax.front_contribute(f, p, *args)
    return types.SimpleNamespace(apply=always(fc.apply), params=fc.params, expand=fc.expand)


def merged(f, p, args):
    found = fcjax.merge(f, p, *args)
    return types.SimpleNamespace(apply=found.apply, params=found.params)


@always
def merged_by_force(f, p, args):
    found = fcjax.merge(f, p, *args)
    return types.SimpleNamespace(apply=always(found.apply), params=found.params)


def optimized(optimizer):
    """Front contribution for an optimizer, which may remove weights."""

    def make(f, p, args):
        fc = fcjax.front_contribute(f, p, *args, optimizer=optimizer)
        return types.SimpleNamespace(apply=fc.apply, params=fc.params, expand=fc.expand)

    return make
