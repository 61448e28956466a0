"""Bytes that data-parallel training all-reduces in a step, for backprop and for fcjax.

    python benchmarks/sharding.py [--machine NAME]

Eight host devices share the batch of the linear classifier 784-1024x4-10. The bytes are counted
from the shapes of the all-reduces in the text of the compiled program.
"""

import math
import os
import re

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from typing import Any

import jax
from collapse import gradient_step
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from models import NETWORKS
from recording import parser, record, show

import fcjax

FEWER = 100.0
COLUMNS = ("mesh", "all-reduced bytes BP", "fcjax", "times fewer", "verdict")
ALL_REDUCE = re.compile(r"= (.+?) all-reduce(?:-start)?\(")
SHAPE = re.compile(r"\b(?:f|bf|s|u)(\d+)\[([\d,]*)\]")


def all_reduced_bytes(hlo: str) -> int:
    """Bytes of the operands of all all-reduces in a compiled program's text."""
    return sum(
        int(bits) // 8 * math.prod(int(n) for n in shape.split(",") if n)
        for result in ALL_REDUCE.findall(hlo)
        for bits, shape in SHAPE.findall(result)
    )


def measure(kind: str, axis_type: AxisType) -> dict[str, Any]:
    """All-reduced bytes of both steps on a mesh of eight devices."""
    network = NETWORKS["linear-784-4096"]()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    fc = fcjax.front_contribute(network.apply_fn, network.params, network.batch)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("data"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        params = jax.device_put(fc.params, everywhere)
        batch, target = jax.device_put((network.batch, network.target), rows)
        counted = [
            all_reduced_bytes(
                gradient_step(network, apply).lower(params, batch, target).compile().as_text()
            )
            for apply in (network.apply_fn, fc.apply)
        ]
    fewer = counted[0] / max(counted[1], 1)
    verdict = "PASS" if counted[1] and fewer >= FEWER else f"FAIL: below {FEWER:g}"
    return {"mesh": kind, "bytes": counted, "times_fewer": fewer, "verdict": verdict}


def as_row(result: dict[str, Any]) -> list[str]:
    """One row of the table."""
    backprop, folded = result["bytes"]
    times = f"{result['times_fewer']:.0f}"
    return [result["mesh"], f"{backprop:,}", f"{folded:,}", times, result["verdict"]]


def main() -> None:
    options = parser("bytes all-reduced in a data-parallel step").parse_args()
    kinds = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
    results = {kind: measure(kind, axis_type) for kind, axis_type in kinds.items()}
    show(
        f"jax {jax.__version__}, {options.machine}", COLUMNS, [as_row(r) for r in results.values()]
    )
    if not options.quick:
        print(record("sharding", options.machine, results, COLUMNS, as_row))


if __name__ == "__main__":
    main()
