"""Processes that torchrun or srun has started."""

import pytest

from ich_det2.engine.checks import check_processes
from ich_det2.engine.launched import Launched, first_host

TORCHRUN = {
    **{"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    **{"MASTER_ADDR": "one", "MASTER_PORT": "29500"},
}
SRUN = {
    **{"SLURM_JOB_ID": "4000001", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"},
    **{"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_a_process_alone_is_not_launched():
    assert Launched.from_environment({}) is None
    assert Launched.from_environment({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}) is None
    assert Launched.from_environment({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_a_batch_script_of_slurm_is_alone_whatever_the_job_asked_for():
    script = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert Launched.from_environment(script) is None


def test_the_place_that_torchrun_names():
    expected = Launched("torchrun", 5, 8, 1, 4, "one", 29500)
    assert Launched.from_environment(TORCHRUN) == expected
    assert Launched.from_environment({**SRUN, **TORCHRUN}) == expected  # torchrun under srun


def test_what_torchrun_starts_anew_does_not_meet_what_was():
    again = {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}
    assert Launched.from_environment(again).attempt == 2
    # Each machine has a count of its own.
    assert Launched.from_environment({**again, "GROUP_WORLD_SIZE": "2"}).attempt == 0


def test_the_place_that_slurm_names():
    assert Launched.from_environment(SRUN) == Launched("srun", 5, 8, 1, 4, "gpu07", 51457)
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert Launched.from_environment({**SRUN, **own}) == Launched(
        "srun", 5, 8, 1, 4, "10.0.0.1", 1234
    )
    one = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8"}
    assert Launched.from_environment(one).local_world_size == 8


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("a1,a2", "a1"),
        ("gpu[03-05,9],login", "gpu03"),
        ("rack[2,4]-node[10-12]", "rack2-node10"),
        ("n-0-[1-3].cluster.org", "n-0-1.cluster.org"),
    ],
)
def test_the_first_of_slurms_machines(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, ("LOCAL_RANK", "unset RANK")),
        ({**TORCHRUN, "MASTER_PORT": "http"}, ("MASTER_PORT", "'http'")),
        (
            {
                **TORCHRUN,
                **{"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"},
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            },
            ("--max-restarts", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        ),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4,3"}, ("4,3", "--ntasks-per-node")),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, ("SLURM_STEP_NODELIST",)),
    ],
)
def test_half_an_environment_is_named(environ, words):
    with pytest.raises(ValueError) as error:
        Launched.from_environment(environ)
    assert all(word in str(error.value) for word in words)


def test_processes_are_asked_for_once(monkeypatch):
    launched = Launched.from_environment(TORCHRUN)
    with pytest.raises(ValueError, match="--num-gpus is 2.*torchrun has started 8"):
        check_processes(2, 1, 0, launched)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    check_processes(1, 1, 0, launched)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ValueError, match="4 processes on this machine, but each sees 1 GPUs"):
        check_processes(1, 1, 0, launched)
