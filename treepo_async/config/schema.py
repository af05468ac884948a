"""The schema of a run: one dataclass a part, one documented knob a line, defaults in code.

The defaults are the embedded run: a tiny model and its task on one CPU machine. `help` texts are what
`python launch/run.py --help` prints.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any


def knob(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A documented dataclass field with the values it may take."""
    bounds = {"at_least": at_least, "above": above, "choices": choices}
    return field(default=default, metadata={"help": help, **bounds})


def knobs(section: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Every knob of a config dataclass under its dotted key, in the order written."""
    for entry in fields(section):
        if is_dataclass(entry.type):
            yield from knobs(entry.type, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, entry


TINY, TINY_PRECEDENCE = BUILT_IN = ("tiny", "tiny-precedence")
"""Built-in tasks; each name is also that of the model that was warm-started on the task."""


ESTIMATORS = (
    "treepo",
    "treepo_size_weighted",
    "treepo_subgroup_reject",
    "treepo_size_weighted_subgroup_reject",
    "treepo_no_root",
    "treepo_dedup_levels",
    "grpo",
    "rloo",
    "tree_grpo",
    "treerl",
    "treerpo",
    "spo",
)
"""Advantage estimators; `tree.advantage` says what each is."""
LEAVE_ONE_OUT = tuple(name for name in ESTIMATORS if name.startswith("treepo") or name == "grpo")
"""Estimators that can leave a trajectory out of the means it is compared with."""
PATH_WEIGHTS = ("equal", "unbiased")
"""What a trajectory counts; `tree.path_weights` says what each is."""
LOSSES = ("ppo", "cispo", "gspo", "gspo_segment", "reinforce", "dppo")
"""Policy losses; `learner.loss.policy` says what each is."""
NORMALIZERS = ("token_mean", "sequence_mean", "dr_grpo", "unique_token")
"""What the loss is divided by; `learner.loss.normalizer` says what each is."""
CORRECTIONS = ("none", "truncated", "icepop", "importance")
"""Importance weights of tokens that other weights sampled; `learner.loss.correction` says what each is."""
MASKS = ("geometric", "window", "k3", "veto_token", "veto_segment", "veto_subtree", "m2po")
"""Rules that leave tokens out; `learner.loss.mask` says what each is."""
PROXIMALS = ("auto", "current", "recomputed", "interpolated")
"""What the clip range is centred on; `learner.loss.proximal` says what each is."""
TRANSPORTS = ("disk", "broadcast")
"""How weights reach the engines; `weights` says what each needs."""
DURABILITIES = ("disk", "memory")
"""Where accepted trees lie; `replay.store` says what each gives and gives up."""
STALE_TREES = ("drop", "regrow")
"""What becomes of an accepted tree that is too old for its batch; `tree.regrow` says what is kept."""
DTYPES = ("float32", "bfloat16")
"""Of engine and learner."""
PACKINGS = ("auto", "tree", "flat")
"""How trees are cut into pieces; `learner.packing.divide` says what each is."""
ATTENTIONS = ("auto", "dense", "cascade", "flex")
"""Backends of the learner's attention; `learner.attention.plan` has them."""
RECOMPUTES = ("none", "selective", "full")
"""Activations computed again; `learner.model.gpt` says what Megatron is told."""
KL_ESTIMATORS = ("k1", "k2", "k3")
"""Of the divergence to the reference policy; `learner.loss.policy` says what each is."""


@dataclass
class ModelConfig:
    """The model that is trained."""

    path: str = knob(
        TINY, "tiny or tiny-precedence (built and cached here), a Hugging Face folder, or a hub id"
    )
    dtype: str = knob(
        "float32",
        "of the engine and the learner; with bfloat16 the learner keeps float32 master weights",
        choices=DTYPES,
    )


@dataclass
class DataConfig:
    """Where prompts come from."""

    path: str = knob(
        TINY, "tiny or tiny-precedence, a .jsonl or .parquet file, or a Hugging Face dataset id"
    )
    eval_path: str | None = knob(
        None, "held-out problems; default: a fixed part of data.path that is never trained"
    )
    prompt_field: str | None = knob(
        None, "field of the question; default: prompt, question or problem"
    )
    answer_field: str | None = knob(
        None, "field of the answer; default: answer, solution or ground_truth"
    )
    instruction: str = knob(
        "\nReason step by step and put the final answer in \\boxed{}.",
        "appended to each question (not for the built-in tasks)",
    )
    max_prompt_tokens: int = knob(1024, "longer prompts are skipped and counted", at_least=1)
    epochs: int | None = knob(
        None,
        "passes over the data; default: as many as the steps need, of data.trees one",
        at_least=1,
    )
    trees: str | None = knob(
        None, "train on the trees of this file, which launch/actor.py wrote, instead of growing any"
    )


@dataclass
class TreeConfig:
    """How a tree grows (TreePO, section 2.2)."""

    segment_tokens: int = knob(
        10, "tokens of a segment; trees fork at its multiples only", at_least=1
    )
    max_depth: int = knob(
        7, "segments of a path; segment_tokens * max_depth is the response limit", at_least=1
    )
    width: int = knob(16, "trajectories of a prompt", at_least=1)
    branching_factor: int = knob(2, "forks a path asks for at each boundary", at_least=1)
    first_fork_min: int = knob(
        2,
        "paths started at the prompt: drawn from first_fork_min..first_fork_max",
        at_least=1,
    )
    first_fork_max: int = knob(2, "see first_fork_min")
    growth: str = knob(
        "barrier",
        "barrier: a tree's next round waits for all its paths; eager: a path forks as soon as its own "
        "segment is there; independent: width whole responses that share the prompt alone",
        choices=("barrier", "eager", "independent"),
    )
    split: str = knob(
        "even",
        "how forks are dealt to the surviving paths: even; by the mean log-prob of their last segment "
        "(more to high or to low); by the entropy at the boundary",
        choices=("even", "logprob_high", "logprob_low", "entropy"),
    )
    split_temperature: float = knob(
        2.0, "of the softmax over these scores, at the first step", above=0
    )
    split_temperature_end: float | None = knob(
        None, "at the last step, along half a cosine; default: the same", above=0
    )
    fallback: str = knob(
        "random",
        "refill a tree whose paths have all ended from one that ended by EOS or box: random: at a random "
        "boundary; low_confidence: before a segment, the more likely the lower its mean log-prob; "
        "from_start: at the prompt; none: fewer leaves",
        choices=("random", "low_confidence", "from_start", "none"),
    )
    max_tree_tokens: int | None = knob(
        None, "no fork whose path could lift the tree above this many decoded tokens", at_least=1
    )
    stop_boxed: bool = knob(True, "a complete \\boxed{...} ends a path")
    repetition_window: int = knob(32, "a text window of this many characters ...", at_least=1)
    repetition_count: int = knob(
        8,
        "... seen this often ends the path, counted over its last one to two times window x count tokens; 0: never",
        at_least=0,
    )
    max_response_tokens: int | None = knob(
        None, "response limit; default: segment_tokens * max_depth", at_least=1
    )
    temperature: float = knob(1.0, "sampling temperature; the learner divides by it too", above=0)


@dataclass
class PruneConfig:
    """Which paths end early (besides those that repeat themselves, see tree.repetition_count).

    A pruned path has no reward: it is in no group and in no loss.
    """

    min_logprob: float | None = knob(
        None, "a path whose last segment has a lower mean log-prob is pruned; default: never"
    )
    value: str | None = knob(
        None,
        "a path whose value is lower than prune.min_value is pruned: agreement (share of its tree's paths "
        "with the same partial answer), logprob (mean over the path), or package.module:function taking "
        "(response so far, responses of all paths so far); default: never",
    )
    min_value: float = knob(0.0, "see prune.value")
    first_level: int = knob(0, "paths are judged after this level and later ones", at_least=0)
    probability: float = knob(
        1.0,
        "with which such a path is pruned; below 1 those that go on stand for the pruned ones in every "
        "estimator, by the inverse of their probability to go on",
        above=0,
    )
    stale: bool = knob(
        False, "prune paths too old for any batch, whole ones too, see replay.max_staleness"
    )
    refill: bool = knob(
        True, "a pruned path's place is refilled by a fallback; false: the tree has fewer leaves"
    )


@dataclass
class RewardConfig:
    """How a leaf is scored."""

    scorer: str = knob(
        "exact",
        "exact, math (math-verify), or package.module:function taking (response, answer), giving 0..1; "
        "try one with launch/reward.py",
    )
    timeout_s: float = knob(
        10.0, "scoring one response; beyond it the response is unscored", above=0
    )
    workers: int = knob(
        1,
        "processes of an actor that score, except for exact; one that hangs is killed",
        at_least=1,
    )
    correct: float = knob(1.0, "reward of accuracy 1")
    wrong: float = knob(-1.0, "reward of accuracy 0")
    overlong_tokens: int = knob(
        0,
        "in the last so many tokens before the response limit the reward falls linearly ...",
        at_least=0,
    )
    overlong_penalty: float = knob(1.0, "... by this much at the limit", at_least=0)
    shuffle: bool = knob(
        False,
        "control run: rewards and accuracies of a tree are permuted among its leaves, "
        "so nothing can be learned from them",
    )


@dataclass
class EngineConfig:
    """The SGLang server."""

    url: str | None = knob(
        None,
        "running SGLang servers, http://host:port, one or more joined by commas, to use instead of starting any",
    )
    api_key_file: str | None = knob(
        None,
        "file with the key that the server at engine.url asks for, readable by its owner alone",
    )
    tp: int = knob(1, "tensor parallel size of an engine: its GPUs", at_least=1)
    cpu_threads: int = knob(1, "OMP threads of an engine without CUDA", at_least=1)
    cores: str | None = knob(
        None, "CPU cores of the engines' processes, e.g. 0 or 0,4-7; default: any"
    )
    max_total_tokens: int | None = knob(
        32768, "tokens of KV cache; null: SGLang sizes it from free memory", at_least=1
    )
    max_running_requests: int = knob(64, "requests decoded together", at_least=1)
    context_length: int | None = knob(
        None,
        "default: data.max_prompt_tokens + the response limit, at most the model's",
        at_least=1,
    )
    start_timeout_s: float = knob(200.0, "from process start to healthy", above=0)
    request_timeout_s: float = knob(120.0, "one generate request", above=0)
    stream_tokens: int = knob(
        256,
        "requests for more tokens are watched segment by segment and ended at their stop (box, repetition, prune.stale); "
        "0: none is, what is behind a stop is cut all the same",
        at_least=0,
    )
    drain_timeout_s: float = knob(
        60.0,
        "running requests may take this long to end before new weights",
        above=0,
    )
    update_mode: str = knob(
        "drain",
        "requests that run when new weights come: drain: end first; retract: go on with a KV cache "
        "computed again; in_place: go on with the old KV cache, marked mixed_context. The last two "
        "start SGLang without overlap scheduling, which blurs the token at which the weights "
        "changed, and with the policy fcfs, so that the proof of the weights has priority",
        choices=("drain", "retract", "in_place"),
    )
    update_timeout_s: float = knob(60.0, "loading new weights", above=0)
    max_restarts: int = knob(
        10,
        "without new weights (launch/actor.py: a tree) in between; after that the run ends",
        at_least=0,
    )
    hang_timeout_s: float = knob(
        60.0,
        "a server whose counters stand still under load, or that answers no probe, is started again",
        above=0,
    )
    prefill_chunk_tokens: int = knob(4096, "tokens of prefill in one forward pass", at_least=1)


@dataclass
class ActorConfig:
    """The processes that grow trees."""

    concurrent_trees: int = knob(8, "trees an actor grows at once", at_least=1)
    tree_timeout_s: float = knob(
        600.0,
        "growing one tree; what has not ended then is cut off, and the tree has the leaves that have "
        "(none: the lease is given up)",
        above=0,
    )
    sick_after: int = knob(
        8,
        "leases in a row that an actor fails on (trees that outlive their deadlines together are one); then it ends, with "
        "the reason",
        at_least=1,
    )
    cpu_threads: int = knob(1, "OMP threads of an actor", at_least=1)
    cores: str | None = knob(None, "CPU cores of the actors, see engine.cores")
    engines: int | None = knob(
        None,
        "engines that an actor uses, its home (actor i: engine i modulo engines) and those after it; default: all, at "
        "most 4",
        at_least=1,
    )


@dataclass
class ReplayConfig:
    """Leases, admission and the replay queue."""

    prompts_per_batch: int = knob(16, "trees of one step", at_least=1)
    max_staleness: int = knob(
        1,
        "publications a trained segment may lie behind the learner; 0: synchronous",
        at_least=0,
    )
    lease_timeout_s: float = knob(
        60.0,
        "without a heartbeat of its actor (every 2 s) a lease is given to another",
        at_least=6,
    )
    max_attempts: int = knob(
        3,
        "failed leases of a prompt, by two actors at least where there are two, before it is quarantined "
        "(replay/dead_letters.jsonl has it)",
        at_least=1,
    )
    drop_degenerate: bool = knob(
        True, "trees whose leaves are all right or all wrong are replaced at once"
    )
    max_refills: int = knob(
        64,
        "degenerate trees replaced between two batches; beyond it they are trained as they are",
        at_least=0,
    )
    max_lost: int = knob(
        64,
        "prompts in a row that were quarantined or could not be scored; then the run ends",
        at_least=1,
    )
    max_tree_bytes: int = knob(64 * 2**20, "larger trees are refused", at_least=1)
    durability: str = knob(
        "disk",
        "disk: a tree is acknowledged once it is on disk; memory: trees die with replay, and their prompts are grown "
        "again, so that a resumed run trains on other trees",
        choices=DURABILITIES,
    )
    segment_bytes: int = knob(
        64 * 2**20, "a file of trees is followed by another at this size", at_least=2**16
    )
    max_disk_bytes: int = knob(
        64 * 2**30,
        "trees on disk; no further prompt is leased where a tree of the largest size so far would not fit, until a "
        "checkpoint retires some",
        at_least=2**20,
    )
    stale_trees: str = knob(
        "drop",
        "accepted trees that are too old for their batch, as after a resume with a lower max_staleness: drop, or regrow "
        "(segments that are young enough stay, the rest of the tree is sampled again)",
        choices=STALE_TREES,
    )


@dataclass
class LearnerConfig:
    """The Megatron-Core learner."""

    layout: str = knob("tp1", "ranks: tp, pp and dp sizes, e.g. tp4pp2")
    lr: float = knob(6e-5, "learning rate after warm-up", above=0)
    warmup_steps: int = knob(5, "steps of linear warm-up", at_least=0)
    beta1: float = knob(0.9, "AdamW")
    beta2: float = knob(0.98, "AdamW")
    weight_decay: float = knob(0.0, "AdamW; biases and norms are not decayed", at_least=0)
    clip_grad: float = knob(1.0, "gradient norm; 0: no clipping", at_least=0)
    estimator: str = knob(
        "treepo",
        "advantage: of a trajectory, or (treerl, treerpo, spo) of each of its segments",
        choices=ESTIMATORS,
    )
    leave_one_out: bool = knob(
        False,
        "compare a trajectory with the others of its groups, without itself (treepo family, grpo)",
    )
    path_weights: str = knob(
        "equal",
        "equal: every trajectory counts the same; unbiased: by its probability under the tree's forks, so "
        "that paths that ended early are not outnumbered",
        choices=PATH_WEIGHTS,
    )
    whiten: bool = knob(True, "advantages to mean 0 and variance 1 over the tokens of the batch")
    minibatches: int = knob(
        1,
        "updates of a batch, each on its share of the trees; PPO's clip acts from 2 on",
        at_least=1,
    )
    loss: str = knob(
        "ppo",
        "ppo (clipped, with dual_clip), cispo, gspo (ratio of a whole trajectory), gspo_segment, reinforce, dppo "
        "(total-variation mask against the policy that sampled)",
        choices=LOSSES,
    )
    anchor: str = knob(
        "proximal",
        "policy that the ratio of the loss is taken against: proximal, or behavior, which corrects for staleness "
        "inside the loss and leaves nothing for learner.correction",
        choices=("proximal", "behavior"),
    )
    proximal: str = knob(
        "auto",
        "log-probs that the clip range is centred on: current (of the very pass; one update a batch), recomputed "
        "(one more forward pass at the start of the batch), interpolated (between behavior and current by the "
        "lag, without that pass: A-3PO); auto: recomputed where it is needed",
        choices=PROXIMALS,
    )
    clip_low: float = knob(0.2, "clip range, 1 - clip_low")
    clip_high: float = knob(0.28, "clip range, 1 + clip_high", at_least=0)
    dual_clip: float | None = knob(
        None, "upper bound of the ratio where the advantage is negative; default: none", above=1
    )
    tv_clip: float = knob(0.2, "of loss=dppo: largest change of a token's probability", above=0)
    normalizer: str = knob(
        "token_mean",
        "token_mean (of all trajectories), sequence_mean (of each, then over them), dr_grpo (by the "
        "most tokens a tree lets one have), unique_token (each token once, however many trajectories share it)",
        choices=NORMALIZERS,
    )
    kl_coef: float = knob(
        0.0,
        "weight of the divergence to the model the run began with; 0: no such model is kept",
        at_least=0,
    )
    kl_estimator: str = knob("k3", "of that divergence", choices=KL_ESTIMATORS)
    entropy_coef: float = knob(0.0, "weight of the entropy, which is lifted", at_least=0)
    correction: str = knob(
        "truncated",
        "importance weight of tokens that other weights sampled: truncated (TIS), icepop (0 outside of "
        "correction_floor..correction_cap), importance (no bound), none",
        choices=CORRECTIONS,
    )
    correction_cap: float = knob(2.0, "upper bound of that weight", above=0)
    correction_floor: float = knob(0.5, "lower bound of icepop", at_least=0)
    correct_fresh: bool | None = knob(
        None,
        "also weigh tokens sampled under the very version trained from, where engine and learner differ by rounding "
        "alone; default: with bfloat16 only",
    )
    mask: str = knob(
        "none",
        "leave tokens out, one or more joined by +: geometric (segments whose mean log-ratio is far off for their "
        "length and lag), window (segments whose mean ratio is outside of mask_low..mask_high), k3 (segments "
        "whose mean k3 is above mask_k3), veto_token, veto_segment, veto_subtree (what a ratio below mask_veto "
        "stands in), m2po (the largest squared log-ratios, until their mean is mask_m2po)",
    )
    mask_sigmas: float = knob(
        3.0, "of geometric: standard errors of a mean of that length ...", above=0
    )
    mask_lag: float = knob(0.02, "... and nats for each publication of lag", at_least=0)
    mask_low: float = knob(0.8, "of window", above=0)
    mask_high: float = knob(1.2, "of window", above=0)
    mask_k3: float = knob(0.01, "of k3, in nats", above=0)
    mask_veto: float = knob(1e-4, "of the vetoes", above=0)
    mask_m2po: float = knob(0.04, "of m2po, in nats squared", above=0)
    value_correction: str = knob(
        "none",
        "vtrace: the means that a trajectory is compared with weigh each leaf by how likely its path has become",
        choices=("none", "vtrace"),
    )
    vtrace_cap: float = knob(1.0, "of vtrace: upper bound of a level's factor", at_least=1)
    packing: str = knob(
        "auto",
        "tree (what trajectories share is computed once), flat (each trajectory by itself), auto: the one that costs "
        "less for a tree",
        choices=PACKINGS,
    )
    attention: str = knob(
        "auto",
        "dense (any device, memory quadratic in a microbatch), cascade (CPU), flex (CUDA); auto by device",
        choices=ATTENTIONS,
    )
    recompute: str = knob(
        "none",
        "activations computed again in the backward pass: none, selective (attention), full (whole layers)",
        choices=RECOMPUTES,
    )
    head_tokens: int = knob(4096, "trained tokens whose logits are in memory at once", at_least=1)
    microbatch_tokens: int = knob(
        4096, "unique tokens of one forward and backward pass", at_least=1
    )
    batch_timeout_s: float = knob(
        600.0, "longest wait for one batch; the run ends beyond it", above=0
    )
    cpu_threads: int = knob(1, "torch threads of a rank", at_least=1)
    cores: str | None = knob(None, "CPU cores of the ranks, see engine.cores")
    sequence_parallel: bool = knob(
        True, "tensor-parallel ranks also divide norms and residuals by tokens; acts with tp > 1"
    )
    group_timeout_s: float = knob(
        120.0,
        "longest wait of a collective: a rank that hangs is noticed by then, one that dies at once",
        above=10,
    )
    max_restarts: int = knob(
        3, "starts of all ranks after one died, from the newest checkpoint", at_least=0
    )


@dataclass
class WeightsConfig:
    """How the learner's weights reach the engines."""

    transport: str = knob(
        "disk",
        "disk: a write-once folder that engines load, on a file system they share with the learner; broadcast: a "
        "collective from the learner's ranks into each engine (gloo, NCCL with CUDA)",
        choices=TRANSPORTS,
    )
    dir: str | None = knob(
        None,
        "folder of the publications, e.g. in /dev/shm on one machine; default: weights in run_dir",
    )
    bucket_bytes: int | None = knob(
        None,
        "tensors sent together by a broadcast; default: 256 MiB with CUDA, else 24 MiB",
        at_least=2**16,
    )
    timeout_s: float = knob(120.0, "one engine's part in a broadcast", above=0)


@dataclass
class CheckpointConfig:
    """What a run can go on from: weights, optimizer, random state, place in the data."""

    every: int = knob(10, "steps between checkpoints (also after the last)", at_least=1)
    keep: int = knob(2, "newest checkpoints that are kept", at_least=1)


@dataclass
class EvalConfig:
    """Held-out accuracy at a pinned policy version."""

    every: int = knob(
        10,
        "steps between evaluations (also before the first and after the last); 0: never",
        at_least=0,
    )
    problems: int = knob(128, "held-out problems", at_least=1)
    samples: int = knob(8, "sampled responses of each problem, beside the greedy one", at_least=1)
    timeout_s: float = knob(300.0, "one evaluation; given up beyond it", above=0)


@dataclass
class MetricsConfig:
    """What is recorded."""

    tensorboard: bool = knob(True, "write TensorBoard events beside metrics.jsonl")
    trace: bool = knob(True, "keep the spans of all processes in trace.jsonl, for launch/trace.py")
    gap_alarm: float | None = knob(
        None,
        "alarm when log-probs of engine and learner differ by more nats at one version; default: 1e-4 with float32, "
        "0.5 with bfloat16",
        above=0,
    )


@dataclass
class ClusterConfig:
    """Where processes run."""

    ray_address: str | None = knob(
        None, "an existing Ray cluster, host:port or auto; default: a local one for this run"
    )
    token_file: str | None = knob(
        None,
        "file with the token of that cluster (RAY_AUTH_MODE=token), readable by its owner alone",
    )
    runtime_env: str | None = knob(
        None, "JSON or YAML file with Ray's runtime environment of every role, e.g. env_vars"
    )
    start_timeout_s: float = knob(240.0, "from launch until every role is ready", above=0)
    stop_timeout_s: float = knob(5.0, "for a role to end by itself before it is killed", above=0)
    stall_s: float = knob(
        30.0, "without progress it is said what is waited for, and who should end the wait", above=0
    )
    host: str = knob(
        "127.0.0.1",
        "address that replay and engine hosts bind; any other than loopback needs cluster.keys_dir",
    )
    keys_dir: str | None = knob(
        None, "CURVE keys of the run's sockets, made by launch/keys.py; default: none, on loopback"
    )


@dataclass
class Config:
    """A run. Sections are set as `section.key=value`."""

    actors: int = knob(2, "actor processes", at_least=1)
    engines: int = knob(1, "SGLang servers; see actor.engines", at_least=1)
    steps: int = knob(40, "batches to train on, learner.minibatches updates each", at_least=1)
    seed: int = knob(
        0,
        "prompt order, tree forks and fallbacks, model initialisation and warm start; "
        "not SGLang's token sampling, which has no working seed on CPU",
        at_least=0,
    )
    run_dir: str | None = knob(None, "default: runs/<date>-<time>")
    resume: bool = knob(
        True, "go on with the run that run_dir holds, with its config; false: refuse such a folder"
    )
    cache_dir: str = knob(".cache/treepo_async", "tiny model, Ray's token file")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


@dataclass
class GenerateConfig:
    """A stand-alone actor (`launch/actor.py`): every prompt's tree into a file, without learner and replay."""

    out: str | None = knob(
        None, "file of the trees, .jsonl or .parquet; one that holds this job is gone on with"
    )
    out_form: str = knob(
        "trees",
        "trees: one line (row) a prompt; trajectories: one line a leaf, without the tree's shape",
        choices=("trees", "trajectories"),
    )
    limit: int | None = knob(
        None, "first so many prompts; default: all (a built-in task has no end)", at_least=1
    )
    overwrite: bool = knob(False, "begin anew where out holds something already")
    retry_failed: bool = knob(False, "try the prompts again that failed in an earlier start")
    max_failed: int = knob(16, "prompts in a row that failed; then the job ends", at_least=1)
    concurrent_trees: int = knob(8, "trees grown at once", at_least=1)
    seed: int = knob(
        0,
        "tree forks and fallbacks, problems of a built-in task, warm start of a built-in model; "
        "not SGLang's token sampling, which has no working seed on CPU",
        at_least=0,
    )
    cache_dir: str = knob(".cache/treepo_async", "tiny model")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tree: TreeConfig = field(default_factory=TreeConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


AnyConfig = Config | GenerateConfig
"""Both have the sections that say how trees are grown."""
