"""What `hfsft STAGE` hands to Accelerate, and the exit status it makes of its ranks'."""

import signal
from pathlib import Path

import pytest
import yaml

from hfsft.errors import RecipeError
from hfsft.launch import Processes, _command, _status_of_ranks, planned_spread


@pytest.fixture(autouse=True)
def no_config_of_the_user(tmp_path, monkeypatch):
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("given", "multi_gpu", "count"),
    [
        ({}, False, 1),
        ({"num_processes": 1}, False, 1),
        ({"num_processes": 4}, True, 4),
        ({"config_file": "cpu", "num_processes": 2}, True, 2),
        ({"config_file": "multi_gpu"}, False, None),
        ({"config_file": "multi_gpu", "num_processes": 3}, False, 3),
    ],
)
def test_processes_asked_for_are_handed_on(given, multi_gpu, count, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    command = _command("sft", "r.yaml", ["--max_steps", "3"], Processes(**given))
    assert (command.multi_gpu, command.num_processes) == (multi_gpu, count)
    several = multi_gpu or "multi_gpu" in given.values()
    assert command.main_process_port == (0 if several else None)
    assert command.training_script == "hfsft.sft"
    assert command.training_script_args == ["r.yaml", "--max_steps", "3"]


def test_machines_are_handed_on():
    where = Processes("multi_node", 6, 3, 2, "10.0.0.1", 29777)
    command = _command("base", "r.yaml", [], where)
    assert (command.num_machines, command.machine_rank, command.num_processes) == (3, 2, 6)
    assert (command.main_process_ip, command.main_process_port) == ("10.0.0.1", 29777)
    assert not where.is_main_machine() and where.machines() == 3
    assert Processes("multi_node").is_main_machine() and Processes().is_main_machine()


def test_an_unknown_config_is_refused():
    with pytest.raises(RecipeError, match="no such file none"):
        Processes("none").options()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no settings"),
        ("distributed_type: 'NO'\nnum_procs: 2", "unknown keys (['num_procs'])"),
        ("num_processes: [", "while parsing"),
        ("distributed_type: SOME", "SOME"),
    ],
)
def test_a_wrong_config_is_named(text, reason, tmp_path):
    path = tmp_path / "none.yaml"  # the user's own, too
    path.write_text(text)
    for processes in (Processes(str(path)), Processes()):
        with pytest.raises(RecipeError) as caught:
            processes.options()
        assert str(caught.value).startswith(f"{path}: not a config of Accelerate: ")
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, 2), "--machine_rank: give each of 2 machines its own, 0 to 1"),
        ((None, 2, 2, 2, "10.0.0.1"), "--machine_rank: "),
        ((None, 2, 2, 0), "--main_process_ip: "),
        ((None, 3, 2, 0, "10.0.0.1"), "--num_processes 3 .* need a multiple of 2"),
        (("multi_node", 1), "--num_processes 1 "),
        (("multi_node", None, 3), "--num_processes 2 "),
    ],
)
def test_machines_that_cannot_be_started_are_refused(given, message):
    with pytest.raises(RecipeError, match=message):
        Processes(*given).options()


def test_plans_are_spread_as_asked():
    assert planned_spread(Processes("fsdp2", 8)) == planned_spread(Processes("fsdp2", 8))
    spreads = [planned_spread(Processes(*given)) for given in ((), ("zero2",), (None, 4))]
    assert [(s.processes, s.kind) for s in spreads] == [(1, "DDP"), (2, "ZeRO-2"), (4, "DDP")]


@pytest.mark.parametrize(
    ("codes", "signalled", "status"),
    [
        ([-signal.SIGKILL, 2], False, 2),
        ([-signal.SIGKILL, 143], False, 2),  # torchrun's own SIGTERM is no cause
        ([143, -signal.SIGKILL], False, 2),
        ([-signal.SIGKILL], False, 2),
        ([143, 143], True, 143),
        ([143, 143], False, 143),  # one rank was told to stop, and all did
        ([1, 143], False, 1),
        ([130], True, 130),
    ],
)
def test_a_rank_that_was_killed_gives_2(codes, signalled, status):
    assert _status_of_ranks(codes, signalled) == status


def test_torchrun_on_a_cluster_gives_ranks_the_time_of_a_checkpoint(monkeypatch):
    from torch.distributed.run import get_args_parser

    cluster = Path(__file__).parents[1] / "cluster"
    pod = yaml.safe_load((cluster / "pytorchjob.yaml").read_text())
    pod = pod["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (variable,) = pod["containers"][0]["env"]
    sky = yaml.safe_load((cluster / "sky.yaml").read_text())["envs"]
    assert sky[variable["name"]] == variable["value"]
    monkeypatch.setenv(variable["name"], variable["value"])
    seconds = get_args_parser().parse_args(["a.py"]).shutdown_timeout
    assert 30 < seconds < pod["terminationGracePeriodSeconds"]
