"""What one rank knows of its process, its node and its container; travels to rank 0 as JSON.

None, or a name in `unknown`, means that it could not be found out; nothing is guessed.
"""

from __future__ import annotations

from pydantic import Field

from hpctrain.table import Table


class Space(Table):
    """A folder's file system."""

    folder: str
    type: str | None
    """As /proc/self/mounts names it: "ext4", "lustre", "tmpfs"."""
    free_bytes: int
    total_bytes: int
    writable: bool


class Gpus(Table):
    """The accelerators that this rank sees."""

    devices: list[str]
    """Device files of the node, without /dev/."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES, ROCR_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES, as NAME=value."""
    torch_count: int | None = None
    """What torch sees; None: torch was not asked, as there is no device file."""
    taken: str | None = None
    """Identity of the GPU that `train.device = "auto"` gives this rank."""


class Container(Table):
    """The container this rank runs in."""

    kind: str
    """Which software: "apptainer" (also Singularity) or "docker"."""
    image: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)


class Mpi(Table):
    """What the MPI library says."""

    rank: int
    size: int
    library: str
    standard: str
    thread_level: str
    mpi4py: str
    allreduce: str
    loaded: str | None
    """Path of the libmpi in memory."""
    transports: list[str]
    """Communication libraries in memory: "ucx", "libfabric", ...; Open MPI loads some unused."""


class Probe(Table):
    """What a process of its own said that loaded torch, Horovod or MPI for us."""

    torch: dict[str, str | bool | None] | None = None
    horovod: dict[str, str | bool | list[str] | None] | None = None
    mpi: dict[str, str | None] | None = None
    problems: dict[str, str] = Field(default_factory=dict)
    """Stage that failed -> why."""


class Allocation(Table):
    """The batch job around us, asked for on rank 0 only."""

    scheduler: str
    job: str
    nodes: int | None = None
    seconds_left: float | None = None
    source: str = ""
    """Where the time left was read, or why it could not be."""


class Facts(Table):
    """All of it, for one rank."""

    rank: int
    """By the launcher, before MPI is started; by MPI afterwards."""
    host: str
    launcher: str
    launcher_family: str
    launcher_size: int | None
    versions: dict[str, str | None]
    processor: str | None = None
    boot_id: str | None = None
    """Equal for two ranks exactly if they run on the same kernel."""
    user_namespace: str | None = None
    in_user_namespace: bool | None = None
    cores: list[int] | None = None
    """Logical processors this process may use."""
    cores_of_node: int | None = None
    omp_threads: int | None = None
    """OMP_NUM_THREADS, None if it is not set to a number."""
    gpus: Gpus | None = None
    fabric: list[str] = Field(default_factory=list)
    """Fast network devices of the node, such as "infiniband/mlx5_0"."""
    memlock_bytes: int | None = None
    """Limit of locked memory; -1: none."""
    open_files: int | None = None
    temporary: Space | None = None
    shared_memory: Space | None = None
    container: Container | None = None
    user_site: str | None = None
    """The user's own site-packages folder, where this Python reads from it."""
    topology: dict[str, str] = Field(default_factory=dict)
    """SLURMD_NODENAME, SLURM_TOPOLOGY_ADDR and its pattern, as far as they are set."""
    settings: dict[str, str] = Field(default_factory=dict)
    """Variables that choose MPI's transport."""
    allocation: Allocation | None = None
    probe: Probe | None = None
    """On the first rank of each node."""
    mpi: Mpi | None = None
    """None: MPI was not started."""
    unknown: dict[str, str] = Field(default_factory=dict)
    """Fact -> why it could not be found out."""

    def to_bytes(self) -> bytes:
        """For the gather. Local."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, payload: bytes) -> Facts:
        """The inverse of `to_bytes`. Local."""
        return cls.model_validate_json(payload)
