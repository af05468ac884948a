"""Benchmarks of the engine, of sampling, of training and of the replay queue, behind `launch/bench.py`, and a check of attention.

`http` is what a request costs outside of the engine. `sampling` grows trees and independent responses in turn on one
engine: `command` reads its words into `cells`, `measure` makes a `samples.Sample` of an arm, `summary` sums up a cell,
`report` and `plot` write. `shapes` is the closed form that full-length trees must meet.

`learner` trains the same trees tree-packed, flat and padded: `learner_cells` reads the words, `learner_trees` and `learner_shapes` make
trees and models, `learner_run` makes a `learner_samples.LearnerSample` of a way and compares gradients by `learner_gradient`,
`learner_report` writes. `curves` puts the held-out accuracy of runs side by side.

`queue` delivers trees to replay processes: `queue_cells` reads the words, `queue_trees` makes trees, `queue_replay` and `queue_actors` are processes,
`queue_client` is actor and learner, `queue_run` measures, `queue_samples` are the rows, `queue_report` writes.

`async_compare` puts synchronous and asynchronous runs side by side: `async_cells` reads the words, `async_arms` says what an arm is, `async_rows`
are the rows of every back end, `async_summary`, `async_report` and `async_plot` sum up and write. `async_real` starts runs that
`async_read` reads. `async_scripted` sets up an `async_script`, whose processes are in `async_roles`: `async_actor` with the engine
`async_service`, `async_gates` and `async_learner`; `async_virtual` is a clock that jumps. `sim_arms` simulates.

`campaign` is what `launch/gpu_campaign.sh` runs: `campaign_parts` are its commands, `campaign_report` writes. Commands of their own that it calls: `attention`
checks backends of tree attention by `attention_checks` on `forests`, `device_step` compares updates on a device and on a CPU, `learner_profile` says where a pass
spends its time, `weight_path` takes a publication through its stages; `device_clock` times. `published` is a folder of a published model without weights.
`machine` says what a benchmark ran on, `peak` counts memory.
"""
