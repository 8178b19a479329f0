"""The resolver: what each launcher's environment says of a rank, and environments that contradict themselves."""

import pytest

from trimaran.launchers.env.rank_env import RankEnv, RankEnvError, is_rank, read_env, tasks_per_node

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
# As srun -N2 -n4 set them on a real cluster, and hydra and Open MPI theirs.
STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURMD_NODENAME": "n2",
}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_HOSTNAME": "n2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}  # fmt: skip
SHELL = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1",
}  # fmt: skip
BATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURMD_NODENAME": "n1",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, ("torchrun", 5, 8, 1, 4)),
        (STEP, ("slurm", 3, 4, 1, 2)),
        (HYDRA, ("mpi", 3, 4, 1, 2)),
        (OPEN_MPI, ("mpi", 3, 4, 1, 2)),
        (STEP | {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_FD": "11"}, ("mpi", 3, 4, 1, 2)),
        (STEP | {"PMIX_RANK": "3"}, ("mpi", 3, 4, 1, 2)),
        ({}, ("single", 0, 1, 0, 1)),
        (BATCH, ("single", 0, 1, 0, 1)),
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, ("single", 0, 1, 0, 1)),
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "x"}, ("single", 0, 1, 0, 1)),
        # the shell of `srun --pty bash` where srun has an MPI plugin by default
        (SHELL | {"PMI_RANK": "0", "PMI_SIZE": "1"}, ("slurm", 0, 1, 0, 1)),
        (SHELL | {"PMIX_RANK": "0"}, ("slurm", 0, 1, 0, 1)),
        ({"PMIX_RANK": "0"}, ("single", 0, 1, 0, 1)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, ("single", 0, 1, 0, 1)),
        # an agent a node, started by srun; mpirun inside a job, whose hydra proxies are the tasks of a step
        (STEP | TORCHRUN, ("torchrun", 5, 8, 1, 4)),
        (STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "0"} | HYDRA,
         ("mpi", 3, 4, 1, 2)),
    ],
    ids=[
        "torchrun", "slurm", "hydra", "open-mpi", "srun-pmi2", "srun-pmix", "single", "batch-script",
        "interactive-step", "left-over", "shell-pmi2", "shell-pmix", "pmix-alone", "mpi-of-one",
        "agent-in-a-step", "mpirun-in-a-job",
    ],
)  # fmt: skip
def test_place_in_each_launchers_environment(
    environment: dict[str, str], expected: tuple[str, int, int, int, int]
) -> None:
    rank_env = read_env(environment)
    assert (
        rank_env.launcher,
        rank_env.rank,
        rank_env.world_size,
        rank_env.local_rank,
        rank_env.local_world_size,
    ) == expected
    assert is_rank(environment) == (expected[0] != "single" and expected[2] > 1)


def test_starts_that_must_not_be_mixed_up_have_names_of_their_own() -> None:
    starts = [
        read_env(STEP),
        read_env(STEP | {"SLURM_RESTART_COUNT": "1"}),
        read_env(STEP | {"SLURM_STEP_ID": "4"}),
        read_env(STEP | {"SLURM_JOB_ID": "8"}),
        read_env(TORCHRUN),
        read_env(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "3"}),
    ]
    assert len({rank_env.start for rank_env in starts}) == len(starts)


def test_nodes_of_one_host_are_told_apart_by_slurms_name() -> None:
    assert read_env(STEP).node == "n2"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            STEP | {"PMI_RANK": "0", "PMI_SIZE": "1"},
            "MPI says 1 ranks and this Slurm step has 4 tasks; start it with srun --mpi=pmi2",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "2"},
            "RANK is set, as torchrun does, but not LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
        ),
        (TORCHRUN | {"RANK": "8"}, "says rank 8 of 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "says local rank 4 of 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "says 9 ranks on this node and 8 in all"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many', not a number"),
        ({key: value for key, value in STEP.items() if key != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2*2"}, r"SLURM_STEP_TASKS_PER_NODE is '2\*2'"),
        (STEP | {"SLURM_NODEID": "2"}, "SLURM_NODEID is 2, and SLURM_STEP_TASKS_PER_NODE names 2 nodes"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "PMI_SIZE is set, as mpirun does, but not MPI_LOCALRANKID"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK is 1, but no variable says how many ranks .* pass --launcher local"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(environment: dict[str, str], words: str) -> None:
    with pytest.raises(RankEnvError, match=words):
        read_env(environment)


def test_a_task_that_would_run_alone_is_refused() -> None:
    with pytest.raises(RankEnvError, match="this Slurm step has 4 tasks, and each would run alone"):
        read_env(STEP, "single")
    with pytest.raises(RankEnvError, match="no task of a Slurm step"):
        read_env(BATCH, "slurm")


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("4(x2)", [4, 4]), ("4(x2),3,2(x3)", [4, 4, 3, 2, 2, 2])])
def test_slurms_short_form_of_tasks(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


def test_place_is_plain_data() -> None:
    assert RankEnv("single", 0, 1, 0, 1, "here", "single") == read_env({"SLURMD_NODENAME": "here"})
