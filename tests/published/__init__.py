"""Published models, unmodified, against the network as written.

Every model is made by the package that published it, from a small configuration, and everything is
compared with plain JAX on the model itself:

* gradients, in double precision by numpy (as planned, and with every rewrite forced) and in single
  precision as compiled; ten steps of Adam; ``strict=True``;
* conservation laws, whose derivatives along the gradient must be zero;
* ``merge``, in the same three ways and for several batch sizes;
* temporaries and operations of compiled programs, stored bytes, processor time of the transform.

It is no part of CI, because it needs many packages. From the root of the checkout::

    python -m venv published-env
    published-env/bin/pip install -e . -r tests/published/requirements.txt
    published-env/bin/python -m tests.published                 # everything, about 40 minutes
    published-env/bin/python -m tests.published BERT dm-haiku   # a model, all of a package
    published-env/bin/python -m tests.published --list

It prints a line for each model and a table. A line that begins with ``FAILS`` names what does not
hold: deviations as fractions of what is allowed, temporaries and operations as ratios to those of
the program as written, times in seconds. The command returns 1 if there is any.

A model is added by a function under ``@model`` in ``packages/``, in the module with the name of its
package (``adapters.py`` has what Flax, Equinox and Haiku need).
"""
