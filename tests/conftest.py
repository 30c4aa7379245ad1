"""What all of these tests need."""

from __future__ import annotations

from fsae.devices import avoid_faulty_kernels

# Before the first test computes: some train in bfloat16, in a process that has computed before.
avoid_faulty_kernels()
