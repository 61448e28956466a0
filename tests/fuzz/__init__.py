"""Random programs against plain JAX.

A random program is data: a list of steps with their arguments (`programs`). It is written as Python
(`writing`), executed, given to the library and compared with itself as JAX runs it (`comparing`):
outputs and gradients by every floating array, where NaN and infinities stand, ten steps of
training, laws, certificates. float64 may be off by 1e-10 of an array's largest entry and by what
rounding the weights otherwise changes; narrower types by twice the error that the network as
written has against itself in float64. What raises in the library and runs in JAX is a failure, and
so is a plan that takes longer than `--seconds`. A program that fails is shrunk (`shrinking`) and
printed as code that needs nothing but the library.

From the root of the repository::

    python -m tests.fuzz --list               # the families
    python -m tests.fuzz dense 500            # 500 programs of a family, seeds 0 to 499
    python -m tests.fuzz dense 1 1234         # the one of a seed, as a failure names it
    python -m tests.fuzz --all 1200           # 10,800 programs over all families

The last is what to run before a release, on the oldest and the newest Python. `test_fuzz.py` runs
80 programs of each family, half of them on either, whose seeds advance with the number of commits:
every commit tries programs that none has tried before.

An operation is a function in one of the `ops_*` modules: it takes the values it reads, and
keyword-only arguments whose domains the decorator names; it returns an expression. What JAX refuses
is not drawn, so an operation needs no conditions of its own. A family (`families`) is a choice of
operations and of checks; drawing and shrinking know nothing about either.
"""
