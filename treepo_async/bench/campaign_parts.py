"""The parts of the GPU campaign: commands, what each needs, and how long it may take. Neighbour: `campaign` runs them. Pure."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

PASSED, KEPT, SKIPPED, FAILED = "passed", "kept", "skipped", "FAILED"
TORCH = ("torch", "numpy")
LEARNER = (*TORCH, "megatron", "xxhash")
ENGINE = (*TORCH, "sglang", "aiohttp", "zmq", "msgspec")
RUN = (*ENGINE, *LEARNER, "ray")
SHAPES = ("0.5b", "1.5b", "7b")


@dataclass(frozen=True, slots=True)
class Part:
    """One command."""

    name: str
    """`GROUP` or `GROUP-DETAIL`; of its log too."""
    command: tuple[str, ...]
    needs: tuple[str, ...]
    """Packages that must be installed."""
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """What the parts that measure the same have in common."""
        return self.name.partition("-")[0]

    @property
    def line(self) -> str:
        """The command as one would type it."""
        return " ".join(("python", *self.command[1:]))


@dataclass(frozen=True, slots=True)
class Result:
    """How a part ended."""

    name: str
    line: str
    outcome: str
    seconds: float
    reason: str
    """Why it was skipped or failed."""
    origin: Mapping[str, str]
    """Code and device."""

    def stands_for(self, part: Part, origin: Mapping[str, str]) -> bool:
        """Whether the part need not run again."""
        return self.outcome in (PASSED, KEPT) and (self.line, dict(self.origin)) == (
            part.line,
            dict(origin),
        )

    def kept(self) -> Self:
        """The same, of an earlier campaign."""
        return replace(self, outcome=KEPT)

    def to_row(self) -> dict[str, object]:
        """As JSON takes it."""
        return asdict(self)


def parts_of(*, on_cpu: bool, out: Path) -> list[Part]:
    """All parts, in the order in which they run: what is cheapest and decides most comes first.

    Args:
        on_cpu: the same commands at sizes of a rehearsal, with CUDA hidden.
        out: the campaign's folder.
    """
    parts = [*_attention(on_cpu, out), _step(out), *_learner(on_cpu, out)]
    parts += [*_weights(on_cpu, out), *_sampling(on_cpu, out), _run(out)]
    if on_cpu:
        hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return [replace(part, environment=hidden) for part in parts]
    return parts


def _attention(on_cpu: bool, out: Path) -> list[Part]:
    """Compilation takes most of the time, for each precision and kind of heads anew."""
    words = ("-m", "treepo_async.bench.attention")
    size = f"size={'small' if on_cpu else 'full'}"
    exact = [
        _part(
            f"exactness-{dtype}",
            *words,
            "exactness",
            f"dtype={dtype}",
            f"out={out}",
            size,
            needs=TORCH,
            limit_s=300,
        )
        for dtype in ("float32", "bfloat16")
    ]
    return [*exact, _part("memory", *words, "memory", f"out={out}", size, needs=TORCH, limit_s=120)]


def _step(out: Path) -> Part:
    return _part(
        "step",
        "-m",
        "treepo_async.bench.device_step",
        f"out={out}",
        needs=(*LEARNER, "safetensors", "tokenizers"),
        limit_s=600,
    )


def _learner(on_cpu: bool, out: Path) -> list[Part]:
    """Training of made trees; the budget holds a whole tree: 16 trajectories of 4,096 tokens, 17k to 23k of them different."""
    if on_cpu:
        words = ["shape=cpu", "width=4", "depth=3", "segment=8", "prompt=8"]
        return _trained("cpu", words, ["branching=late", "rounds=1"], out)
    parts = []
    for shape in SHAPES:
        words = f"shape=qwen2.5-{shape} dtype=bfloat16 segment=512 prompt=512 budget=24576 width=16".split()
        more = [] if shape == "0.5b" else ["recompute=full"]
        parts += _trained(shape, words + more, ["branching=spread,late,treepo", "rounds=3"], out)
    return parts


def _trained(shape: str, words: list[str], swept: list[str], out: Path) -> list[Part]:
    """Measured, and profiled on one kind of trees."""
    name = f"learner-{shape}"
    profiled = ("-m", "treepo_async.bench.learner_profile", *words, "branching=late", f"out={out}")
    return [
        _bench(name, "learner", *words, *swept, f"out={out / name}", needs=LEARNER, limit_s=600),
        _part(f"profile-{shape}", *profiled, needs=LEARNER, limit_s=300),
    ]


def _weights(on_cpu: bool, out: Path) -> list[Part]:
    shapes = ("cpu",) if on_cpu else tuple(f"qwen2.5-{shape}" for shape in SHAPES[:2])
    return [
        _part(
            f"weights-{shape.removeprefix('qwen2.5-')}",
            "-m",
            "treepo_async.bench.weight_path",
            f"shape={shape}",
            f"out={out}",
            needs=(*LEARNER, "safetensors"),
            limit_s=300,
        )
        for shape in shapes
    ]


def _sampling(on_cpu: bool, out: Path) -> list[Part]:
    """Trees against independent responses: the paper's table over depth and segment at 7,000 tokens a response, by three models."""
    if on_cpu:
        tiny = "shape=2x128 depth=3 segment=8 width=4 prompt=16 prompts=2 pairs=1"
        sizes = {"sampling-cpu": tiny}
    else:
        # 7 x 1000, 14 x 500 and so on are one response length in pieces of other sizes
        sizes = {
            f"sampling-{shape}-{depth}": f"shape=qwen2.5-{shape} depth={depth} segment={7000 // depth} "
            "width=16,64 prompt=256 prompts=16 running=256 pairs=2"
            for shape in SHAPES
            for depth in (7, 14, 28, 56)
        }
    return [
        _bench(name, "sampling", *words.split(), f"out={out / name}", needs=ENGINE, limit_s=1800)
        for name, words in sizes.items()
    ]


def _run(out: Path) -> Part:
    """A whole run of a few updates, on the built-in task."""
    words = ("launch/run.py", "steps=3", f"run_dir={out / 'run'}")
    return _part("run", *words, needs=RUN, limit_s=1200)


def _bench(name: str, *words: str, needs: tuple[str, ...], limit_s: float) -> Part:
    return _part(name, "launch/bench.py", *words, needs=needs, limit_s=limit_s)


def _part(name: str, *words: str, needs: tuple[str, ...], limit_s: float) -> Part:
    return Part(name, (sys.executable, *words), needs, limit_s)
