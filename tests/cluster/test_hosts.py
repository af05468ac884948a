"""What Ray is asked for, and how roles of several machines are wired; no Ray runs here."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from treepo_async.cluster import hosts
from treepo_async.cluster.hosts import address_for, berths_of
from treepo_async.cluster.placement import Node, place
from treepo_async.cluster.plan import NUM_PORTS, demand_of, kind_of, make_plan, seated
from treepo_async.cluster.role import Site, socket_interface
from treepo_async.config.command_line import parse
from treepo_async.errors import ConfigError

WORDS = ["actors=4", "engines=2", "learner=tp4pp2", "cluster.keys_dir=keys"]


def nodes(*gpus, cpus=8):
    found = enumerate(gpus)
    return [Node(f"id{i}", f"10.0.0.{i + 1}", cpus, number, all_gpus=number) for i, number in found]


def berths(words, there, *, is_own=False):
    config = parse(words)
    return berths_of(config, place(demand_of(config), there), is_own=is_own)


def on_cluster(words, there):
    """Wirings by role, with ports counted from 1000 on each node."""
    config = parse(words)
    plan = make_plan(config, run_dir=Path("run"), model_dir=Path("model"))
    placement = place(demand_of(config), there)
    sites, taken = {}, {}
    for name, berth in berths_of(config, placement, is_own=False).items():
        address, number = berth.node.address, NUM_PORTS[kind_of(name)]
        first = taken.get(address, 1000)
        sites[name] = Site(address, tuple(range(first, first + number)))
        taken[address] = first + number
    return {role.name: role.wiring for role in seated(plan, config, placement, sites).roles}


class FakeRay:
    """Two nodes of two CPUs; what is free is said by a list, its last entry for ever."""

    def __init__(self, *free, has=None, addresses=("10.0.0.1", "10.0.0.2")):
        self._free = list(free)
        self._has, self._addresses = has or {"CPU": 2.0}, addresses
        self._private = self.state = self

    def available_resources_per_node(self):
        return self._free.pop(0) if len(self._free) > 1 else self._free[0]

    def nodes(self):
        named = {"Alive": True, "Resources": self._has}
        there = enumerate(self._addresses, 1)
        return [{"NodeID": f"id{i}", "NodeManagerAddress": where, **named} for i, where in there]

    def get_runtime_context(self):
        return self

    def get_node_id(self):
        return "id2"


class RayError(Exception):
    """What Ray raises."""


class RayTaskError(RayError):
    """What Ray raises where a method of a host did."""

    def __init__(self, cause):
        super().__init__(f"Traceback of\n{cause}")
        self.cause = cause


class LocalRay(FakeRay):
    """Two nodes of this machine, whose hosts are objects of this process; every call of them is noted.

    `fails` has what methods raise in the place of their answers, and those in `never` do not come to an end.
    """

    exceptions = SimpleNamespace(RayError=RayError)
    util = SimpleNamespace(
        scheduling_strategies=SimpleNamespace(
            NodeAffinitySchedulingStrategy=lambda node_id, soft: node_id
        )
    )

    def __init__(self, fails=None, never=(), addresses=("127.0.0.1", "127.0.0.1")):
        super().__init__({}, addresses=addresses)
        self.calls, self.fails, self.never, self.options = [], fails or {}, never, []
        self.made_and_killed = []

    def kill(self, handle):
        self.made_and_killed.append(("killed", handle))

    def remote(self, **options):
        self.options.append(options)
        return lambda kind: SimpleNamespace(remote=lambda *args: self._handle(kind(*args)))

    def _handle(self, host):
        def method(name):
            def call(*args):
                self.calls.append((name, args))
                return name, partial(getattr(host, name), *args)

            return SimpleNamespace(remote=call)

        handle = SimpleNamespace(**{name: method(name) for name in ("prepare", "look", "take")})
        self.made_and_killed.append(("made", handle))
        return handle

    def wait(self, calls, *, num_returns, timeout):
        return [], [call for call in calls if call[0] in self.never]

    def get(self, call, *, timeout):
        name, method = call
        if name in self.fails:
            raise RayTaskError(self.fails[name])
        try:
            return method()
        except Exception as error:
            raise RayTaskError(error) from error


def opened(ray, tmp_path, *words):
    """The plan of a run on the nodes of a fake Ray."""
    run_dir, model_dir = tmp_path / "run", tmp_path / "model"
    for folder in (run_dir, model_dir):
        folder.mkdir()
    config = parse(["learner=pp2", "engines=2", "cluster.ray_address=auto", *words])
    plan = make_plan(config, run_dir=run_dir, model_dir=model_dir)
    return hosts.open_hosts(ray, config, plan, is_own=False)[0]


def test_one_host_of_an_address_draws_the_ports_of_all(tmp_path):
    ray = LocalRay()
    plan = opened(ray, tmp_path)
    asked = [args[1] for name, args in ray.calls if name == "prepare"]
    total = sum(NUM_PORTS[kind_of(role.name)] for role in plan.roles)
    assert sorted(asked) == [*[0] * (len(plan.roles) - 1), total]
    wirings = [role.wiring for role in plan.roles]
    ends = {wiring.replay_endpoint for wiring in wirings} | {wiring.group_address for wiring in wirings}  # fmt: skip
    for engine in plan.roles[:2]:
        ends |= {engine.wiring.engine_url, engine.wiring.gate_endpoint}
    ports = [end.rpartition(":")[2] for end in ends if end]
    assert len(set(ports)) == len(ports) == 5


@pytest.mark.parametrize("name", ["prepare", "look", "take"])
def test_a_host_that_cannot_answer_is_told_by_its_node_and_what_it_said(tmp_path, name):
    ray = LocalRay(fails={name: ModuleNotFoundError("No module named 'psutil'")})
    with pytest.raises(
        ConfigError, match=r"node 127\.0\.0\.1 cannot run .*No module named 'psutil'"
    ):
        opened(ray, tmp_path)


def test_an_address_that_no_node_has_is_refused_by_its_key(tmp_path):
    words = ["cluster.host=203.0.113.7", f"cluster.keys_dir={tmp_path}"]
    with pytest.raises(
        ConfigError, match=r"^node 127\.0\.0\.1 cannot be used: 203\.0\.113\.7 is no"
    ):
        opened(LocalRay(), tmp_path, *words)


@pytest.mark.parametrize(("second", "is_asked"), [("127.0.0.1", False), ("127.0.0.2", True)])
def test_several_machines_must_share_the_folder_of_the_publications(tmp_path, second, is_asked):
    ray, folder = LocalRay(addresses=("127.0.0.1", second)), tmp_path / "weights"
    with pytest.raises(ConfigError, match=r"server\.key_secret"):
        opened(ray, tmp_path, f"weights.dir={folder}", f"cluster.keys_dir={tmp_path}")
    asked = {args[0].weights_dir for name, args in ray.calls if name == "look"}
    assert asked == {str(folder) if is_asked else None}


def test_a_host_that_is_not_placed_may_wait_for_its_environment_where_there_is_one(tmp_path):
    with pytest.raises(ConfigError) as caught:
        opened(LocalRay(never=["prepare"]), tmp_path)
    assert "engine-0 was not placed within 60 s" in str(caught.value)
    assert "runtime_env" not in str(caught.value)
    (tmp_path / "again").mkdir()
    with pytest.raises(ConfigError, match=r"cluster\.runtime_env=env\.yaml may take longer"):
        opened(LocalRay(never=["prepare"]), tmp_path / "again", "cluster.runtime_env=env.yaml")


def test_a_role_that_takes_no_slot_moves_to_another_node_or_stays_on_the_only_one(tmp_path):
    (role,) = [role for role in make_plan(parse(["actors=1"]), run_dir=tmp_path, model_dir=tmp_path).roles if role.name == "actor-0"]  # fmt: skip
    ray = LocalRay()
    there = hosts.nodes_of(ray)
    held = hosts.Hosts(ray, {"actor-0": hosts.Berth(there[0], 0, 0)}, tmp_path)
    held.create(role)
    assert held.move(role) == "127.0.0.1"
    assert held.berths["actor-0"].node.id == there[1].id
    ray.nodes = lambda: [FakeRay.nodes(ray)[0]]
    held.berths["actor-0"] = hosts.Berth(hosts.nodes_of(ray)[0], 0, 0)
    assert held.move(role) == "127.0.0.1"
    ray.nodes = list
    assert held.move(role) is None


def test_a_host_that_may_live_is_killed_before_another_one_takes_its_role(tmp_path):
    role = make_plan(parse([]), run_dir=tmp_path, model_dir=tmp_path).roles[-1]
    ray = LocalRay()
    held = hosts.Hosts(ray, {role.name: hosts.Berth(hosts.nodes_of(ray)[0], 0, 0)}, tmp_path)
    held.create(role)
    old = held.handles[role.name]
    held.move(role)
    assert ray.made_and_killed == [("made", old), ("killed", old), ("made", held.handles[role.name])]  # fmt: skip
    held.drop(role.name)
    assert held.handles == {}


def test_cores_that_a_node_has_not_are_a_mistake_of_the_config(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^node 127\.0\.0\.1 cannot be used: engine\.cores names 4096, of which"
    ):
        opened(LocalRay(), tmp_path, "engine.cores=4096")


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(hosts, "LOOK_S", 0.001)
    monkeypatch.setattr(hosts, "FREE_S", 0.1)


BUSY = {"id1": {"CPU": 2.0}, "id2": {}}


@pytest.mark.usefixtures("_quick")
def test_the_drivers_own_node_is_filled_first_once_what_others_hold_is_free():
    demand = demand_of(parse(["learner=pp2", "engines=2"]))
    found = hosts.place_on(FakeRay(BUSY, BUSY, {}), demand)
    assert [node.id for node in found.nodes] == ["id2", "id1"]
    assert found.learner[0].node == 0


@pytest.mark.usefixtures("_quick")
def test_gpus_that_others_hold_are_waited_for():
    free, held = {"GPU": 2.0, "CPU": 8.0}, {"CPU": 8.0}
    demand = demand_of(parse(["learner=pp2", "engines=2"]))
    busy, one = {"id1": held, "id2": held}, {"id1": held, "id2": free}
    found = hosts.place_on(FakeRay(busy, one, {}, has=free), demand)
    assert found.on_gpus
    assert [share.gpus for share in found.learner] == [(0, 1)]
    alone = hosts.place_on(FakeRay({"id1": held}, {}, has=free, addresses=["10.0.0.1"]), demand)
    assert alone.is_shared, "once all of a small node is free"
    with pytest.raises(ConfigError, match="others hold a part of the nodes"):
        hosts.place_on(FakeRay(busy, has=free), demand)


@pytest.mark.usefixtures("_quick")
def test_what_others_hold_for_good_is_told_and_what_has_no_room_at_all_is_refused_at_once():
    with pytest.raises(ConfigError, match="others hold a part of the nodes"):
        hosts.place_on(FakeRay(BUSY), demand_of(parse(["learner=pp2", "engines=2"])))
    with pytest.raises(ConfigError) as caught:
        hosts.place_on(FakeRay(BUSY), demand_of(parse(["learner=pp8"])))
    assert "others" not in str(caught.value)


def test_gpus_are_asked_of_ray_by_role_and_node():
    found = berths([*WORDS, "engine.tp=2"], nodes(8, 8))
    assert (found["learner-0"].node.id, found["learner-0"].gpus) == ("id0", 8)
    assert [(found[f"engine-{i}"].node.id, found[f"engine-{i}"].gpus) for i in (0, 1)] == [
        ("id1", 2),
        ("id1", 2),
    ]
    assert {found[f"actor-{i}"].gpus for i in range(4)} == {0}
    assert {berth.cpus for berth in found.values()} == {0}
    assert {berth.shared_gpus for berth in found.values()} == {()}


def test_without_gpus_ranks_and_engines_ask_for_cpus_on_a_cluster_of_others_alone():
    found = berths(WORDS, nodes(0, 0, cpus=5))
    assert [found[name].cpus for name in ("learner-0", "learner-1", "engine-0", "engine-1")] == [
        4,
        4,
        1,
        1,
    ]
    assert (found["replay-0"].cpus, found["actor-0"].cpus) == (0, 0)
    own = berths(WORDS, nodes(0, cpus=30), is_own=True)
    assert {berth.cpus for berth in own.values()} == {0}


def test_shared_gpus_are_named_to_their_roles_and_not_asked_of_ray():
    found = berths(["learner=tp2", "engines=2"], nodes(2))
    assert found["learner-0"].shared_gpus == (0, 1)
    assert [found[f"engine-{i}"].shared_gpus for i in (0, 1)] == [(1,), (0,)]
    assert {berth.gpus for berth in found.values()} == {0}


def test_on_several_machines_everything_is_reached_at_the_address_of_its_node():
    found = on_cluster(WORDS, nodes(0, 0, cpus=5))
    assert [
        (name, w.first_rank, w.num_ranks) for name, w in found.items() if "learner" in name
    ] == [
        ("learner-0", 0, 4),
        ("learner-1", 4, 4),
    ]
    assert {wiring.replay_endpoint for wiring in found.values()} == {"tcp://10.0.0.1:1004"}
    assert {wiring.group_address for wiring in found.values()} == {"10.0.0.1:1003"}
    assert found["learner-1"].address == "10.0.0.2"
    assert found["engine-1"].engine_url == "http://10.0.0.2:1000"
    assert found["engine-1"].gate_endpoint == "tcp://10.0.0.2:1001"
    assert [e.url for e in found["actor-1"].engines] == ["http://10.0.0.2:1000", "http://10.0.0.1:1000"]  # fmt: skip


def test_a_learner_on_one_node_has_no_group_and_all_ranks():
    found = on_cluster(WORDS, nodes(8, 2))
    assert (found["learner-0"].group_address, found["learner-0"].num_ranks) == ("", None)
    assert "learner-1" not in found


def test_weights_are_offered_by_rank_0_where_they_are_broadcast():
    found = on_cluster([*WORDS, "weights.transport=broadcast"], nodes(0, 0, cpus=5))
    assert {wiring.weights_endpoint for wiring in found.values()} == {"tcp://10.0.0.1:1002"}
    assert {w.weights_endpoint for w in on_cluster(WORDS, nodes(8, 2)).values()} == {""}


def test_nodes_of_one_machine_use_loopback_without_keys():
    there = [replace(node, address="10.0.0.1") for node in nodes(0, 0)]
    assert address_for(parse([]), there) == "127.0.0.1"


def test_several_machines_need_keys_and_no_host():
    with pytest.raises(ConfigError, match=r"2 machines \(10\.0\.0\.1, 10\.0\.0\.2\).*keys\.py"):
        address_for(parse([]), nodes(8, 8))
    assert address_for(parse(WORDS), nodes(8, 8)) is None
    with pytest.raises(ConfigError, match=r"cluster\.host=10\.0\.0\.9 .* leave it out"):
        address_for(parse([*WORDS, "cluster.host=10.0.0.9"]), nodes(8, 8))


def test_gloo_and_nccl_are_bound_to_the_interface_of_the_nodes_address():
    assert socket_interface("127.0.0.1") == {}
    assert socket_interface("203.0.113.7") == {}, "of no interface here"
    others = [
        (name, found.address)
        for name, addresses in psutil.net_if_addrs().items()
        for found in addresses
        if found.family.name == "AF_INET" and not found.address.startswith("127.")
    ]
    for name, address in others[:1]:
        assert socket_interface(address) == dict.fromkeys(
            ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), name
        )
