"""Benchmarks of the engine and of sampling, behind `launch/bench.py`.

`http` is what a request costs outside of the engine. `sampling` grows trees and independent responses in turn on one
engine: `command` reads its words into `cells`, `measure` makes a `samples.Sample` of an arm, `summary` sums up a cell,
`report` and `plot` write. `shapes` is the closed form that full-length trees must meet.
"""
