"""SGLang's server with forked instead of spawned children: `python -m forked_sglang <flags>`.

Three processes that each import SGLang cost most of a start on CPU; forked, the scheduler and the
detokenizer begin with what the server has imported. A CUDA context does not survive a fork, so
this is for machines without one. Attention gets `sglang_attention`. Everything else is
`sglang.launch_server`, with its flags.

Invariant: the start method is chosen once, here, and SGLang's own choice is ignored.
"""

import multiprocessing
import runpy


def keep_fork(method=None, force=False):
    """Take the place of `multiprocessing.set_start_method` and change nothing."""


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    multiprocessing.set_start_method = keep_fork
    from sglang_attention import install

    install()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
