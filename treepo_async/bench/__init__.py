"""Benchmarks of the engine, of sampling, of training and of the replay queue, behind `launch/bench.py`, and a check of attention.

`http` is what a request costs outside of the engine. `sampling` grows trees and independent responses in turn on one
engine: `command` reads its words into `cells`, `measure` makes a `samples.Sample` of an arm, `summary` sums up a cell,
`report` and `plot` write. `shapes` is the closed form that full-length trees must meet.

`learner` trains the same trees tree-packed, flat and padded: `learner_cells` reads the words, `learner_trees` and `learner_shapes` make
trees and models, `learner_run` makes a `learner_samples.LearnerSample` of a way and compares gradients by `learner_gradient`,
`learner_report` writes. `curves` puts the held-out accuracy of runs side by side.

`queue` delivers trees to replay processes: `queue_cells` reads the words, `queue_trees` makes trees, `queue_replay` and `queue_actors` are processes,
`queue_client` is actor and learner, `queue_run` measures, `queue_samples` are the rows, `queue_report` writes.

`attention`, a command of its own that `launch/gpu_check.sh` calls, checks backends of tree attention by `attention_checks` on `forests`.
`machine` says what a benchmark ran on, `peak` counts memory.
"""
