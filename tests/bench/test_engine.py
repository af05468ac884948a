import subprocess
import sys

import aiohttp

from tests.fakes import BASE, FakeSGLang, open_gate
from treepo_async.bench.engine import BenchEngine, children_processor_s
from treepo_async.engine.client import WARM_TOKENS, SamplingSettings


async def test_every_answer_is_noted_also_of_what_only_fills_the_cache():
    async with (
        FakeSGLang(version=str(BASE)) as sglang,
        open_gate() as (_, gate),
        aiohttp.ClientSession() as session,
    ):
        engine = BenchEngine(sglang, gate, session)
        client, other = engine.client(), engine.client()
        prefix = [3] * WARM_TOKENS
        wanted = {"num_runs": 3, "max_new_tokens": 4, "sampling": SamplingSettings(1.0, ())}
        completions = await client.extend(prefix, is_cached=False, **wanted)
        await other.extend([3], **wanted)
        bodies = sglang.bodies("/generate")
    lengths = [len(completion.run) for completion in client.completions]
    assert sorted(lengths) == [0, 4, 4, 4]
    noted = {id(completion.run) for completion in client.completions}
    assert {id(completion.run) for completion in completions} < noted
    assert len(other.completions) == 3
    assert len({body["extra_key"] for body in bodies}) == 2


def test_the_processor_time_of_children_is_counted():
    busy = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    before = children_processor_s()
    with subprocess.Popen(
        [sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        took_s = children_processor_s() - before
        child.communicate(b"\n")
    assert took_s >= 0.2
