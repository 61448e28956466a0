"""Set up JAX for the tests, before it is imported: CPU, float64, and eight host devices."""

import os

HOST_DEVICES = "--xla_force_host_platform_device_count=8"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"
os.environ["FCJAX_RAISE_REFUTED"] = "1"  # a rewrite that a check refutes fails its test
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {HOST_DEVICES}".strip()
